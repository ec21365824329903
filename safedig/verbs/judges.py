"""Who judges the pictures that a command draws."""

from safedig.evaluation.jury import TINY, Judging, Jury, jury
from safedig.evaluation.presets import PRESETS
from safedig.model_folders import SHIPPED
from safedig.progress import say
from safedig.recipes import Recipe
from safedig.verbs import Options


def jury_of(recipe: Recipe, options: Options) -> Jury:
    """The recipe's judges. The tiny world's reads scenes of pictograms: of others it is told that it cannot."""
    found = jury(recipe.judge)
    if (recipe.judge or Judging()).rule == TINY and (recipe.model not in SHIPPED or options.prompts is not None):
        say(
            "Pictures are judged as scenes of the tiny world: what is none of them counts as unrecognised. For "
            f"photographs give --prompts FILE and judge.rule=NAME ({', '.join(PRESETS)})."
        )
    return found
