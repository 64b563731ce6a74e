"""When the VAE's encoder is compiled, and whose latents it gives. Compiling itself needs a GPU: tests/gpu."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from worker.device.vae.encoder import CALLS_BEFORE_COMPILING, VaeEncoder
from worker.model.memory_plan import CHUNK_PIXELS, Decoding

SIDE = 8


class Family:
    """Its latents are its pixels. Counts what is encoded uncompiled."""

    has_tiles = False

    def __init__(self) -> None:
        self.uncompiled = 0
        #: Set while the compiled function runs.
        self.is_compiled = threading.local()

    def to_encoder(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels[None]

    def encode_picture(self, pixels: torch.Tensor, *, in_tiles: bool = False) -> torch.Tensor:
        self.uncompiled += not getattr(self.is_compiled, "now", False)
        return pixels.clone()

    def drawn_latents(self, encoded: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return encoded[0]


class Setup:
    """An encoder whose compiled function is the plain one, in which `before` is called."""

    def __init__(self, thread: ThreadPoolExecutor, planned: Decoding | None, *, in_background: bool) -> None:
        self.family, self.thread = Family(), thread
        self.before: Any = lambda: None
        compiler: Any = SimpleNamespace(
            submit=thread.submit,
            in_background=in_background,
            is_serving=True,
            device_sync_lock=threading.Lock(),
            elsewhere=None,
        )
        family: Any = self.family
        self.encoder = VaeEncoder(family, *([planned] if planned else []), compiler=compiler)

    def compiled(self, function: Any, **_: Any) -> Any:
        def run(pixels: torch.Tensor) -> torch.Tensor:
            self.family.is_compiled.now = True
            try:
                self.before()
                result: torch.Tensor = function(pixels)
                return result
            finally:
                self.family.is_compiled.now = False

        return run

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.encoder.to_latents(pixels, torch.Generator())

    def compile(self, side: int = SIDE) -> None:
        """Encode as many pictures as it takes, and wait for the compiler."""
        for _ in range(CALLS_BEFORE_COMPILING):
            self.encode(torch.zeros(3, side, side))
        self.thread.submit(lambda: None).result(20)
        self.family.uncompiled = 0


@pytest.fixture
def setup_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with ThreadPoolExecutor(1) as thread:

        def make(planned: Decoding | None = None, *, in_background: bool = True) -> Setup:
            setup = Setup(thread, planned, in_background=in_background)
            monkeypatch.setattr(torch, "compile", setup.compiled)
            return setup

        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
        # No capture: the compiled function itself is run.
        monkeypatch.setattr("worker.device.cuda_graphs.WARM_UPS", 1_000_000)
        yield make


def picture(number: int, side: int = SIDE) -> torch.Tensor:
    return torch.full((3, side, side), float(number))


def test_the_encoder_is_compiled_for_a_size_once_it_is_used_often(setup_of: Any) -> None:
    setup = setup_of()
    for number in range(CALLS_BEFORE_COMPILING):
        assert torch.equal(setup.encode(picture(number)), picture(number))
    assert setup.family.uncompiled == CALLS_BEFORE_COMPILING
    setup.thread.submit(lambda: None).result(20)
    one, other = setup.encode(picture(1)), setup.encode(picture(2))
    assert setup.family.uncompiled == CALLS_BEFORE_COMPILING
    assert torch.equal(one, picture(1))
    assert torch.equal(other, picture(2))
    setup.encode(picture(3, 2 * SIDE))
    assert setup.family.uncompiled == CALLS_BEFORE_COMPILING + 1


def test_pictures_of_any_layout_are_encoded_by_the_same_code(setup_of: Any) -> None:
    setup = setup_of()
    setup.compile()
    given = torch.rand(SIDE, SIDE, 3).movedim(-1, 0)
    for pixels in (given, given.contiguous(), given.mT):
        assert torch.equal(setup.encode(pixels), pixels)
    assert setup.family.uncompiled == 0


def test_many_threads_at_once_get_their_own_latents(setup_of: Any) -> None:
    setup = setup_of()
    setup.compile()
    at_once, most = 0, 0

    def before() -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        at_once -= 1

    setup.before = before
    started = threading.Barrier(8)

    def several(number: int) -> bool:
        started.wait(20)
        return all(torch.equal(setup.encode(picture(number + n)), picture(number + n)) for n in range(50))

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(several, range(0, 800, 100)))
    assert most == 1
    assert setup.family.uncompiled == 0


def test_where_the_compiled_encoder_fails_the_plain_one_serves_from_then_on(
    setup_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    setup = setup_of()
    setup.compile()

    def fail() -> None:
        raise torch.OutOfMemoryError("a graph does not fit\nand more")

    setup.before = fail
    caplog.clear()
    for number in (1, 2):
        assert torch.equal(setup.encode(picture(number)), picture(number))
    assert setup.family.uncompiled == 2
    assert caplog.messages == ["The VAE encoder runs uncompiled from now on: a graph does not fit"]


@pytest.mark.parametrize(
    "given",
    [
        {"in_background": False},  # Exact mode.
        {"planned": Decoding(CHUNK_PIXELS // 2)},
        {"planned": Decoding(SIDE * SIDE, tiled=True)},
    ],
)
def test_it_stays_uncompiled_in_exact_mode_and_where_memory_is_short(setup_of: Any, given: Any) -> None:
    setup = setup_of(**given)
    setup.compile()
    setup.encode(picture(1))
    assert setup.family.uncompiled == 1
