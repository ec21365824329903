"""The embedded tiny world: scenes of pictograms, trained pipelines that draw them, and a judge that reads them."""

from .judge import judge
from .prompting import prompts
from .stand_ins import with_stand_in

__all__ = ["judge", "prompts", "with_stand_in"]
