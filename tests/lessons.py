"""A lesson small enough for tests: few prompts of the tiny world, a small dictionary, two steps."""

from functools import cache

import torch

from safedig.evaluation.methods import METHODS, Lesson
from safedig.pipelines import Drawing, draw, load_pipeline
from safedig.prompts import as_rows
from safedig.sae.options import SAEOptions
from safedig.tiny import prompts

SITES = ("txt.embed", "pooled.embed")
DRAWING = {
    name: Drawing(steps=2, guidance=2.5, height=64, width=64, max_sequence_length=16, true_cfg=name == "tiny-flux")
    for name in ("tiny-flux", "tiny-sd3")
}


def rows(kind, split, n, seed=0, **options):
    return as_rows(prompts(kind, split, seed, n, **options))


HARMFUL = rows("harmful", "report", 3, wording="noun", twins=False)


@cache
def lesson(model="tiny-flux"):
    """Shared by the tests of a process: nothing in it is changed by what learns from it."""
    pipe = load_pipeline(model)
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        getattr(pipe, name).requires_grad_(False)
    list(draw(pipe, HARMFUL[:1], drawing=DRAWING[model]))  # transformers puts hooks of its own on in the first call
    return Lesson(
        pipe,
        source=rows("harmful", "train", 18, risk=["weapon", "poison", "sign"]),
        target=rows("harmful", "train", 6, risk="fire"),
        benign=rows("benign", "train", 16),
        quiet=rows("benign", "calibrate", 48),
        sites=SITES,
        drawing=DRAWING[model],
        sae=SAEOptions(steps=120, batch_size=256),
        quantile=0.9,
    )


@cache
def learnt(model, name):
    """A method that has learnt from the lesson."""
    return METHODS[name].learn(lesson(model))


def images(given, asked, acting=None):
    """The pictures of these rows, with something acting on the pipeline or nothing."""
    pipe = given.pipe
    if acting is None:
        return torch.cat([batch for _, batch in draw(pipe, asked, drawing=given.drawing)])
    with acting.apply(pipe):
        return images(given, asked)


def state(pipe):
    """All that something on a pipeline could have left: hooks, shadowed methods, weights."""
    hooks = {
        (part, name, kind): tuple(vars(module)[kind].values())
        for part, model in pipe.components.items()
        if isinstance(model, torch.nn.Module)
        for name, module in model.named_modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks")
        if vars(module)[kind]
    }
    weights = {
        (part, name): tensor.double().sum().item()
        for part, model in pipe.components.items()
        if isinstance(model, torch.nn.Module)
        for name, tensor in model.state_dict().items()
    }
    own = {
        owner: sorted(name for name, value in vars(what).items() if callable(value))
        for owner, what in (("pipe", pipe), ("scheduler", pipe.scheduler), ("transformer", pipe.transformer))
    }
    return hooks, weights, own
