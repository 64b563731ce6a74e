"""Drawing scenes as pictures on the training device, a whole batch at once.

The emoji are stored in twelve resolutions, premultiplied by alpha (mipmaps). A picture is drawn by bilinear
sampling from the resolution just above the wanted one, so that edges are anti-aliased at any size and
position.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from worker.demo.training import packages
from worker.demo.training.captions import BACKGROUNDS, Scene
from worker.demo.training.subjects import Subject

#: Pixels a side of the stored resolutions: each is the one before it, divided by 2^(1/4).
LEVELS = tuple(round(192 / 2 ** (step / 4)) for step in range(12))
#: An emoji whose longest side is less than this, of 256 px, is small on purpose, and stays small.
_MIN_NATIVE_PX = 150
#: Longest side of a subject as a share of the canvas, least and most, by size (small, medium, big). Small is
#: half the canvas: on fewer than 8 latent cells a side an animal's face is lost.
_ALONE = ((0.48, 0.53), (0.73, 0.78), (0.93, 0.98))
_IN_PAIR = ((0.3, 0.33), (0.42, 0.45), (0.48, 0.5))


@dataclass(frozen=True)
class Layout:
    """Where to draw the subjects of a batch of n pictures; all tensors on one device."""

    #: int64 (n, 2): subject per layer, -1 for none. The second layer is drawn over the first.
    subjects: torch.Tensor
    #: float32 (n, 2): longest side in pixels.
    side: torch.Tensor
    #: float32 (n, 2, 2): the centre (x, y) in pixels.
    centre: torch.Tensor
    #: float32 (n, 3): background, sRGB 0..1.
    background: torch.Tensor


@dataclass(frozen=True)
class SceneBatch:
    """Scenes as tensors: subjects (n, 2), sizes (n, 2), backgrounds (n,), all int64."""

    subjects: torch.Tensor
    sizes: torch.Tensor
    backgrounds: torch.Tensor

    @classmethod
    def of(cls, scenes: Sequence[Scene], device: torch.device) -> SceneBatch:
        """The scenes in order; a missing second subject is -1."""
        subjects = [(*scene.subjects, -1)[:2] for scene in scenes]
        sizes = [(*scene.sizes, 1)[:2] for scene in scenes]
        backgrounds = [scene.background for scene in scenes]
        return cls(*(torch.tensor(values, device=device) for values in (subjects, sizes, backgrounds)))

    def __getitem__(self, index: torch.Tensor) -> SceneBatch:
        return SceneBatch(self.subjects[index], self.sizes[index], self.backgrounds[index])

    def layout(self, width: int, height: int) -> Layout:
        """Positions the subjects on a canvas of `width` x `height` pixels, at random sizes in their ranges.

        The position is always the middle of the canvas, or of its half for one of two subjects. A subject
        then covers the same latent cells in every scene, and the denoiser learns it more sharply.
        """
        device, count = self.subjects.device, len(self.subjects)
        pair = self.subjects[:, 1:] >= 0
        ranges = torch.tensor((_ALONE, _IN_PAIR), device=device)[pair.long(), self.sizes]
        share = torch.lerp(ranges[..., 0], ranges[..., 1], torch.rand(count, 2, device=device))
        # Two subjects share the width. On a wide canvas the height limits their size.
        unit = torch.where(pair, float(min(width, 2 * height)), float(min(width, height)))
        x = torch.tensor([[0.5, 0.5], [0.25, 0.75]], device=device)[pair[:, 0].long()]
        centre = torch.stack([x, torch.full_like(x, 0.5)], dim=-1)
        colours = torch.tensor(list(BACKGROUNDS.values()), device=device) / 255
        canvas = torch.tensor([float(width), float(height)], device=device)
        return Layout(self.subjects, share * unit, centre * canvas, colours[self.backgrounds])


class Composer:
    """All emoji on one device, and the drawing of layouts. 1,600 emoji take about 0.8 GB."""

    def __init__(self, subjects: list[Subject], folder: Path, device: torch.device) -> None:
        """Reads the pictures from the npm tarball in `folder`."""
        archive = packages.members(packages.fetch(packages.PICTURES, folder), ".webp")
        files = {Path(name).name: content for name, content in archive.items()}
        self.count = len(subjects)
        self.device = device
        native = torch.stack([_square(files[subject.filename]) for subject in subjects])
        levels = [_shrunk(native, size, device) for size in LEVELS]
        self._texels = torch.cat([level.reshape(-1) for level in levels])
        starts = [0]
        for size in LEVELS[:-1]:
            starts.append(starts[-1] + self.count * size * size)
        self._starts = torch.tensor(starts, device=device)
        self._sizes = torch.tensor(LEVELS, device=device)

    def draw(self, layout: Layout, width: int, height: int) -> torch.Tensor:
        """The pictures: float32 (n, 3, height, width), -1..1."""
        picture = layout.background[:, :, None, None].expand(-1, 3, height, width)
        for layer in range(2):
            rgba = self._layer(layout, layer, width, height)
            picture = rgba[:, :3] + picture * (1 - rgba[:, 3:])
        return picture * 2 - 1

    def _layer(self, layout: Layout, layer: int, width: int, height: int) -> torch.Tensor:
        """One layer of each picture: float32 (n, 4, height, width), premultiplied RGBA, 0..1."""
        subject, side = layout.subjects[:, layer], layout.side[:, layer]
        # The smallest resolution that is at least the wanted one: shrinking by less than 2^(1/4) hardly
        # aliases.
        level = (self._sizes[None] >= side[:, None] - 0.5).sum(dim=1).clamp(min=1) - 1
        size = self._sizes[level]
        first = self._starts[level] + subject.clamp(min=0) * size * size
        scale = (size / side)[:, None]
        x = (torch.arange(width, device=self.device) + 0.5 - layout.centre[:, layer, :1]) * scale
        y = (torch.arange(height, device=self.device) + 0.5 - layout.centre[:, layer, 1:]) * scale
        x, y = x + size[:, None] / 2 - 0.5, y + size[:, None] / 2 - 0.5
        total = torch.zeros(len(subject), 4, height, width, device=self.device)
        shifts = torch.arange(0, 32, 8, device=self.device)[None, :, None, None]
        for step_y in range(2):
            row, weight_y = _tap(y, step_y, size[:, None])
            for step_x in range(2):
                column, weight_x = _tap(x, step_x, size[:, None])
                index = first[:, None, None] + row[:, :, None] * size[:, None, None] + column[:, None, :]
                texel = (self._texels[index][:, None] >> shifts) & 255
                total = total + texel * (weight_y[:, :, None] * weight_x[:, None, :])[:, None]
        return total * ((subject >= 0)[:, None, None, None] / 255)


def _tap(position: torch.Tensor, step: int, size: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One of the two texels beside each position on one axis: index and weight, 0 beyond the edge."""
    index = (position.floor() + step).long()
    weight = (1 - (position - index).abs()) * ((index >= 0) & (index < size))
    return torch.minimum(index.clamp(min=0), size - 1), weight


def _square(webp: bytes) -> torch.Tensor:
    """The emoji cut to what is visible and centred in a 256 px square: uint8 (4, 256, 256), premultiplied."""
    image = Image.open(io.BytesIO(webp)).convert("RGBA")
    box = image.getchannel("A").point(lambda alpha: 255 if alpha > 8 else 0).getbbox() or (0, 0, *image.size)
    cut = image.crop(box)
    side = max(*cut.size, _MIN_NATIVE_PX)
    canvas = Image.new("RGBA", (side, side))
    canvas.paste(cut, ((side - cut.width) // 2, (side - cut.height) // 2))
    pixels = np.asarray(canvas, dtype=np.float32)
    pixels = np.concatenate([pixels[..., :3] * (pixels[..., 3:] / 255), pixels[..., 3:]], axis=-1)
    square = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    resized = functional.interpolate(square, size=(256, 256), mode="bicubic", antialias=True)
    return resized[0].clamp(0, 255).round().to(torch.uint8)


def _shrunk(native: torch.Tensor, size: int, device: torch.device) -> torch.Tensor:
    """The squares at `size` px, RGBA in one int32 per pixel (red lowest): (n, size, size)."""
    packed = []
    for chunk in native.split(128):
        small = functional.interpolate(
            chunk.to(device).float(), size=(size, size), mode="bicubic", antialias=True
        )
        alpha = small[:, 3:].clamp(0, 255)
        # Bicubic overshoot must not make a premultiplied colour greater than its alpha.
        small = torch.cat([torch.minimum(small[:, :3].clamp(min=0), alpha), alpha], dim=1)
        texels = small.round().to(torch.int32)
        packed.append(texels[:, 0] | texels[:, 1] << 8 | texels[:, 2] << 16 | texels[:, 3] << 24)
    return torch.cat(packed)


def to_images(pictures: torch.Tensor) -> list[Image.Image]:
    """Pictures (n, 3, height, width), -1..1, as PIL images."""
    pixels = (
        ((pictures.float().clamp(-1, 1) + 1) * 127.5)
        .round()
        .to(torch.uint8)
        .permute(0, 2, 3, 1)
        .cpu()
        .numpy()
    )
    return [Image.fromarray(picture) for picture in pixels]


def contact_sheet(images: Sequence[Image.Image], columns: int = 8, gap: int = 4) -> Image.Image:
    """The images in rows of `columns`, `gap` pixels apart, on white."""
    width, height = max(image.width for image in images), max(image.height for image in images)
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), (255, 255, 255))
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(image, (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet
