"""Steerings made by hand: features that fire on everything or on one prompt, with all that edits are made from."""

from dataclasses import replace

import torch

from safedig.activations.record import record
from safedig.features import Counterparts, Dose, Features, Prototypes
from safedig.features.counterparts import Known
from safedig.pipelines import Drawing, fingerprint
from safedig.prompts import prompts_from_rows
from safedig.sae.model import Decoder, SparseAutoencoder, ThresholdEncoder
from safedig.sites import Site, d_in
from safedig.steering.edits import Blend, Repel, Replace
from safedig.steering.gate import Gate
from safedig.steering.material import Material
from safedig.steering.rule import Rule
from safedig.steering.steering import Steering

TXT, POOLED = Site.parse("txt.embed"), Site.parse("pooled.embed")
IMG = Site.parse("transformer_blocks.0.img.resid_post")
EVERYWHERE = [TXT, POOLED, IMG]
DRAWING = Drawing(steps=2, guidance=3.0, height=32, width=32, max_sequence_length=12, true_cfg=True)
NEVER, ALWAYS = float("inf"), -1.0
EVERY_EDIT = [
    (Repel(1.0),),
    (Blend(0.5),),
    (Repel(1.0), Blend(0.5)),
    (Repel(0.2, "paper"),),
    (Blend(0.2, "paper"),),
    (Replace(),),
    (Replace(by="counterparts"),),
]


def rule(pipe, site, gate=ALWAYS, strength=1.0, **options):
    """Four features that fire on everything, in random directions."""
    generator = torch.Generator().manual_seed(0)
    width = d_in(pipe, site)
    encoder = ThresholdEncoder(torch.zeros(width, 4), torch.ones(4), torch.zeros(4))
    directions = torch.randn(4, width, generator=generator)
    return Rule(torch.arange(4), encoder, Material(directions), Gate(gate, **options), (Repel(strength),))


def steering(pipe, where=EVERYWHERE, **options):
    return made_of(pipe, {site: rule(pipe, site, **options) for site in where})


def made_of(pipe, rules):
    """A steering with these very rules."""
    eye, one = torch.eye(1), torch.ones(1)
    sae = SparseAutoencoder(ThresholdEncoder(eye, one, one), Decoder(eye, one), {"model": fingerprint(pipe)})
    made = Steering({TXT: sae}, {TXT: Features(torch.tensor([0]), 1.0, one, one)})
    made.rules, made.facts = rules, dict.fromkeys(rules, made.facts[TXT])
    return made


def whole(pipe, where=EVERYWHERE, gate=ALWAYS):
    """SAEs that reconstruct, SAEs of the contrast beside them, and features with prototypes, all of random numbers."""
    saes, contrasts, features = {}, {}, {}
    for site in where:
        generator = torch.Generator().manual_seed(1)
        d, d_sae, M = d_in(pipe, site), 3 * d_in(pipe, site), torch.tensor([5, 0, 9])
        W_enc, W_dec = (torch.randn(*size, generator=generator) for size in ((d, d_sae), (d_sae, d)))
        encoder = ThresholdEncoder(W_enc, torch.full((d_sae,), 0.5), torch.full((d_sae,), 0.1))
        saes[site] = SparseAutoencoder(encoder, Decoder(W_dec / d, torch.ones(d) / d), {"model": fingerprint(pipe)})
        rows = torch.zeros_like(W_dec).index_copy(0, M, torch.randn(3, d, generator=generator))
        contrasts[site] = saes[site].with_decoder(Decoder(rows, torch.zeros(d)), objective="contrast")
        known = Prototypes.of(saes[site].encode(torch.randn(20, d, generator=generator)), M)
        features[site] = Features(M, gate, torch.ones(3), torch.ones(3), known, {"harmful": {"weapons": 7}})
    return saes, contrasts, features


def known(pipe, where=EVERYWHERE):
    """Counterparts of random numbers, every token of which harm has changed."""
    found = {}
    for site in where:
        generator, d = torch.Generator().manual_seed(2), d_in(pipe, site)
        alone, together = (Known(*torch.randn(2, 12, d, generator=generator).unbind(0)) for _ in range(2))
        found[site] = Counterparts(alone, together)
    return found


def weighed(features):
    """The same features with doses of random weights, in which two pairs speak too; no two share a tensor."""
    return {site: replace(one, dose=_dose(seed)) for seed, (site, one) in enumerate(features.items())}


def _dose(seed):
    generator = torch.Generator().manual_seed(seed)
    weights, pair_weights = (torch.randn(size, generator=generator).abs() for size in (3, 2))
    bias, pair_bias, units = torch.tensor(0.5), torch.tensor(0.25), torch.tensor([1.0, 2.0, 0.5])
    return Dose(weights, bias, torch.tensor([[0, 1], [1, 2]]), pair_weights, pair_bias, units)


def edited(pipe, edits, where=EVERYWHERE, gate=ALWAYS, **options):
    """A steering by these edits through the front door."""
    saes, contrasts, features = whole(pipe, where, gate)
    options = {"counterparts": known(pipe, where)} | options
    return Steering(contrasts, features, edits, reconstruction=saes, **options)


def detector(pipe, harmful, harmless, sites=(POOLED,)):
    """Rules whose one feature fires for the first prompt and not for the second, by the mean of its tokens."""
    rules = {}
    for site in sites:
        rows = prompts_from_rows([{"prompt": prompt} for prompt in (harmful, harmless)])
        first = next(iter(record(pipe, rows, site, drawing=DRAWING, tokens="pooled")))
        high, low = first.x
        direction = (high - low) / (high - low).square().sum()
        encoder = ThresholdEncoder(direction[:, None], -(low @ direction)[None] - 0.5, torch.zeros(1))  # 0.5 and −0.5
        rules[site] = Rule(torch.arange(1), encoder, Material(40 * direction[None]), Gate(0.0), (Repel(5.0),))
    return made_of(pipe, rules)
