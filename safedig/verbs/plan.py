"""safedig plan: what a recording will take, before anything is loaded; needs neither weights nor network."""

from typing import Any

from safedig.estimate import GIGA, estimate
from safedig.prompts import load_prompts
from safedig.recipes import Recipe
from safedig.verbs import Options


def run(recipe: Recipe, options: Options) -> dict[str, Any]:
    """Sites, rows, bytes, memory, operations and hours; for the prompts of a file, or as many as the recipe says."""
    return estimate(recipe, None if options.prompts is None else len(load_prompts(options.prompts)))


def table(result: dict[str, Any]) -> str:
    """The same for people."""
    drawing, weights = result["drawing"], result["weights"]
    width = max(len(site) for site in result["sites"])
    lines = [
        f"{result['model']}: {result['class']}, {result['dtype']}, {drawing['height']} × {drawing['width']} pixels, "
        f"{drawing['steps']} steps, guidance {drawing['guidance']:g}",
        "",
        f"{result['prompts']:,} images × {len(result['sigmas'])} σ ({', '.join(f'{s:.3f}' for s in result['sigmas'])})",
        "",
        f"{'site':{width}}  {'stage':>6} {'width':>6} {'tokens':>7} {'rows':>14} {'bytes':>18}",
    ]
    lines += [
        f"{name:{width}}  {site['stage']:>6} {site['d_in']:>6} {site['tokens']:>7} {site['rows']:>14,} "
        f"{site['bytes']:>18,}"
        for name, site in result["sites"].items()
    ]
    lines += [
        f"{'together':{width}}  {'':>6} {'':>6} {'':>7} {result['rows']:>14,} {result['bytes']:>18,}",
        "",
        f"on disk       {result['bytes'] / GIGA:,.2f} GB, and the index",
        f"weights       {_gigabytes(weights['bytes'])}",
        f"… offloaded   {_gigabytes(weights['bytes_of_the_largest'])} (the largest model alone)",
        f"parameters    {', '.join(f'{name} {n / 1e9:.2f} B' for name, n in weights['parameters'].items())}",
        f"forwards      {result['forwards']:,} of {result['tflop_per_forward']:.4g} TFLOP",
        f"time          {result['hours']:.3g} hours at {result['tflops']:g} TFLOP/s sustained (record.tflops=… changes "
        "that), without text encoding",
    ]
    return "\n".join(lines)


def _gigabytes(sizes: dict[str, int]) -> str:
    return ", ".join(f"{size / GIGA:,.2f} GB in {name}" for name, size in sizes.items())
