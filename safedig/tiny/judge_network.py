"""The network that reads a scene: which object and colour at each place, which background; nothing is decided here."""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..config import UsageError
from .concepts import BACKGROUNDS, COLOURS, OBJECTS
from .judgement import EMPTY, UNRECOGNISED

OBJECT_CLASSES = (*OBJECTS, EMPTY, UNRECOGNISED)
COLOUR_CLASSES = tuple(COLOURS)
BACKGROUND_CLASSES = (*BACKGROUNDS, UNRECOGNISED)
CLASSES = {"objects": OBJECT_CLASSES, "colours": COLOUR_CLASSES, "backgrounds": BACKGROUND_CLASSES}
WEIGHTS = Path(__file__).parent / "weights" / "judge"
TENSORS, CARD = "judge.safetensors", "judge.json"


class Reading(NamedTuple):
    """Logits for each place (left, right) and for the picture."""

    objects: Float[Tensor, "n 2 objects"]
    colours: Float[Tensor, "n 2 colours"]
    background: Float[Tensor, "n backgrounds"]


def convolution(c_in: int, c_out: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    """A convolution with batch normalisation: without it the same loss takes more than twice as many pictures."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, size, stride, padding=size // 2, bias=False), nn.BatchNorm2d(c_out))


class Residual(nn.Module):
    """x + conv(relu(conv(relu(x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = convolution(width, width), convolution(width, width)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return x + self.second(self.first(x.relu()).relu())


class SceneReader(nn.Module):
    """Convolutions over the whole picture, 64 → 8 pixels; then one head for the left and the right half."""

    def __init__(self, widths: tuple[int, int, int] = (24, 48, 96), hidden: int = 128) -> None:
        super().__init__()
        a, b, c = widths
        self.features = nn.Sequential(
            *(convolution(3, a, size=5, stride=2), nn.ReLU()),
            *(convolution(a, b, stride=2), Residual(b), nn.ReLU()),
            *(convolution(b, c, stride=2), Residual(c), nn.ReLU()),
        )
        self.place = nn.Sequential(nn.Linear(8 * 4 * c, hidden), nn.ReLU())
        self.objects, self.colours = nn.Linear(hidden, len(OBJECT_CLASSES)), nn.Linear(hidden, len(COLOUR_CLASSES))
        self.background = nn.Sequential(nn.Linear(8 * c, hidden), nn.ReLU(), nn.Linear(hidden, len(BACKGROUND_CLASSES)))

    def forward(self, x: Float[Tensor, "n 3 64 64"]) -> Reading:
        x = self.features((x * 2 - 1).contiguous(memory_format=torch.channels_last))
        seen = self.place(rearrange(x, "n c h (place w) -> n place (c h w)", place=2))
        rows = rearrange(x.mean(-1), "n c h -> n (c h)")
        return Reading(self.objects(seen), self.colours(seen), self.background(rows))


def save_reader(reader: SceneReader, folder: Path) -> None:
    """Write the weights in half precision, and the names of the classes beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().half().contiguous() for k, v in reader.state_dict().items()}, folder / TENSORS)
    (folder / CARD).write_text(json.dumps(CLASSES, indent=1) + "\n", encoding="utf-8")


@cache
@torch.inference_mode(False)  # whoever asks first shall not decide whether others can have gradients through it
def load_reader(folder: Path = WEIGHTS) -> SceneReader:
    """The trained reader; an error where its files are missing, broken or made for another world."""
    retrain = "retrain it with `python -m safedig.tiny.train judge`"
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        reader = SceneReader()
        reader.load_state_dict({k: v.float() for k, v in load_file(folder / TENSORS).items()})
    except FileNotFoundError as error:
        raise UsageError(f"The judge's weights are not in '{folder}': reinstall safedig, or {retrain}.") from error
    except Exception as error:
        raise UsageError(
            f"The judge's weights in '{folder}' cannot be read ({error}): reinstall safedig, or {retrain}."
        ) from error
    if {k: tuple(v) for k, v in card.items()} != CLASSES:
        raise UsageError(f"The judge in '{folder}' was trained on other objects, colours or backgrounds: {retrain}.")
    return channels_last(_merged(reader.eval().requires_grad_(False)))


def _merged(reader: SceneReader) -> SceneReader:
    """Fold each normalisation into its convolution: the same function, a fifth faster."""
    for parent in list(reader.modules()):
        for name, child in parent.named_children():
            match list(child.children()):
                case [nn.Conv2d() as conv, nn.BatchNorm2d() as norm]:
                    setattr(parent, name, nn.utils.fuse_conv_bn_eval(conv, norm))
    return reader


def channels_last(reader: SceneReader) -> SceneReader:
    """Lay the convolutions out as CPUs like them: three times faster."""
    for parameter in reader.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return reader
