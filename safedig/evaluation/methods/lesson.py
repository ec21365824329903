"""What every method learns from: the same prompts, sites and number of strengths to try, and one reading for them all.

What several methods need (a recording, dictionaries, features) is made when first asked for, and shared.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ...activations.record import Activations, record_once
from ...adaptation import adapt, fit_contrast
from ...features import Counterparts, Features, NoFeatureError, find_features, fit_counterparts, weigh
from ...pipelines import Drawing
from ...progress import say
from ...sae.model import SparseAutoencoder
from ...sae.options import SAEOptions
from ...sae.train import train
from ...sites import Site, resolve
from ...steering.conformal import calibrated

Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Lesson:
    """One domain is moved to, the others are known; of both there are pairs, and nothing that will be reported."""

    pipe: Any
    source: list[Row]
    """Harmful prompts of the known domains, each before its safe twin."""
    target: list[Row]
    """The same of the domain that is moved to; few will do. Where there are stand-ins, theirs show the same thing."""
    benign: list[Row]
    quiet: list[Row]
    """Benign prompts that set gates, in words that nothing else is learnt from."""
    sites: tuple[str, ...]
    """Where methods that act inside the transformer do so."""
    strengths: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    """What each method may try, in multiples of its own unit: as many for one as for another."""
    stand_ins: list[Row] = field(default_factory=list)
    """Pairs of the known domains whose twins show one thing in the hazard's place, if there are such."""
    drawing: Drawing | None = None
    sae: SAEOptions = field(default_factory=SAEOptions)
    quantile: float = 0.95
    """Share of the benign prompts on which a gate stays shut."""
    watch: tuple[str, ...] = ()
    """Where ours looks for harm too, and nothing acts."""

    @property
    def pairs(self) -> list[Row]:
        """Of both domains, all kinds of twins together."""
        return [*self.source, *self.target, *self.stand_ins]

    @cached_property
    def places(self) -> list[Site]:
        return resolve(self.pipe, self.sites)

    @cached_property
    def watched(self) -> list[Site]:
        return [site for site in resolve(self.pipe, self.watch) if site not in self.places]

    @property
    def recording(self) -> Activations:
        """What passes the sites for all pairs and the benign prompts."""
        return self._recording.at(*self.places)

    @cached_property
    def _recording(self) -> Activations:
        """The same, at those that are watched too."""
        return self.recorded([*self.pairs, *self.benign], [*self.places, *self.watched])

    @cached_property
    def quiet_recording(self) -> Activations:
        return self.recorded(self.quiet, [*self.places, *self.watched])

    def recorded(self, rows: Iterable[Row], sites: Iterable[Site]) -> Activations:
        return record_once(self.pipe, rows, sites, self.drawing or Drawing.of(self.pipe))

    @cached_property
    def dictionaries(self) -> dict[Site, SparseAutoencoder]:
        """Trained on the source alone."""
        return self._trained(self.places)

    @cached_property
    def all_dictionaries(self) -> dict[Site, SparseAutoencoder]:
        """Those of the watched sites too."""
        return self.dictionaries | self._trained(self.watched)

    def _trained(self, sites: list[Site]) -> dict[Site, SparseAutoencoder]:
        return train(self._recording.of([*self.source, *self.stand_ins, *self.benign]), sites, self.sae)

    @cached_property
    def features(self) -> dict[Site, Features]:
        """The harmful ones by the source's contrast; a site without any is left out."""
        return found(
            self.dictionaries,
            self.recording.of([*self.source, *self.benign]),
            calibration=self.quiet_recording,
            quantile=self.quantile,
        )

    @cached_property
    def weighed(self) -> dict[Site, Features]:
        """All latents weighed together on the pairs of both domains, gates with a guarantee on the quiet prompts."""
        found = weigh(self.all_dictionaries, self._recording)
        return calibrated(found, self.all_dictionaries, self.quiet_recording, epsilon=1 - self.quantile)

    @cached_property
    def counterparts(self) -> dict[Site, Counterparts]:
        """What stood in safety where harm stood, in both domains, and how far from it the quiet prompts lie."""
        saes, quiet = self.all_dictionaries, self.quiet_recording
        return fit_counterparts(saes, self._one_stand_in, self.weighed, quiet=quiet)

    @cached_property
    def weighed_contrast(self) -> dict[Site, SparseAutoencoder]:
        """The encoders with decoders that say what harm adds, of the latents that are weighed."""
        return fit_contrast(self.all_dictionaries, self._one_stand_in, self.weighed)

    @cached_property
    def contrast(self) -> dict[Site, SparseAutoencoder]:
        """The same encoders with decoders that say what harm adds, in the source and the target."""
        return fit_contrast(self.dictionaries, self._one_stand_in, self.features)

    @property
    def _one_stand_in(self) -> Activations:
        known = self.stand_ins or self.source
        return self._recording.of([*known, *self.target, *self.benign])

    @cached_property
    def reconstruction(self) -> dict[Site, SparseAutoencoder]:
        """The same encoders with decoders that reconstruct the target."""
        source = self.recording.of([*self.source, *self.benign])
        return adapt(self.dictionaries, self.recording.of(self.target), self.features, replay=source)


def found(saes: Mapping[Site, SparseAutoencoder], activations: Activations, **options: Any) -> dict[Site, Features]:
    """The features of every site that has any; none at all is an error. Against chance there is the gate."""
    features, why = {}, []
    for site in saes:
        try:
            features |= find_features({site: saes[site]}, activations, fdr=1.0, **options)
        except NoFeatureError as error:
            why.append(error)
            say(f"{site} is left out: {error}")
    if not features:
        raise why[0]
    return features
