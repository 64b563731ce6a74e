"""Files in folders and buckets: what is found, what is wrong with it, and what changes."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save, save_file

from worker.contract.errors import (
    EngineStoppedError,
    MissingFileError,
    PermanentStorageError,
    SettingsError,
    StorageError,
    UnknownJobError,
)
from worker.contract.file_index import FileEntry, Kind
from worker.contract.job import Job
from worker.contract.job_files import with_files
from worker.contract.served_model import Defaults, ServedModel
from worker.model.beside import bucket_files, embedding_files, file_store, lora_header
from worker.model.beside.file_kinds import KINDS
from worker.model.beside.file_store import FileStore
from worker.model.beside.lora_scales import Settings
from worker.storage.bucket import StoredObject

SERVED = ServedModel(
    name="m", revision="r", defaults=Defaults(width=64, height=64, steps=4, guidance_scale=5.0)
)


def embedding(width: int = 768, vectors: int = 2, fill: float = 0.0) -> bytes:
    return save({"emb_params": torch.full((vectors, width), fill)})


def store(place: Path | str, cache: Path, **more: Any) -> FileStore:
    return FileStore({Kind.EMBEDDING: [str(place)]}, cache, **more)


def by_name(files: FileStore) -> dict[str, FileEntry]:
    return {entry.name: entry for entry in files.index.files}


def job(prompt: str, files: FileStore) -> Job:
    return with_files(Job(prompt=prompt, seed=1).resolved(SERVED), files.index)


def test_files_are_found_by_name_content_and_what_they_fit(tmp_path: Path) -> None:
    folder = tmp_path / "embeddings"
    (folder / "sub" / "cat-toy").mkdir(parents=True)
    (folder / "EasyNegative.safetensors").write_bytes(embedding())
    (folder / "sub" / "two.SAFETENSORS").write_bytes(embedding(1_024))
    save_file({"<cat-toy>": torch.zeros(768)}, folder / "sub" / "cat-toy" / "learned_embeds.safetensors")
    both = {"clip_l": torch.zeros(3, 768), "clip_g": torch.zeros(3, 1_280)}
    save_file(both, folder / "xl.safetensors")
    (folder / "readme.txt").write_text("not one")
    (folder / "EasyNegative.preview.png").write_text("not one")
    files = store(folder, tmp_path)
    assert {name: entry.architecture for name, entry in by_name(files).items()} == {
        "EasyNegative": "SD 1.x",
        "two": "SD 2.x",
        "cat-toy": "SD 1.x",
        "xl": "SDXL",
    }
    entry = by_name(files)["EasyNegative"]
    data = (folder / "EasyNegative.safetensors").read_bytes()
    assert (entry.sha256, entry.size) == (hashlib.sha256(data).hexdigest(), len(data))
    assert entry.auto_v2 == entry.sha256[:10].upper()
    assert files.path(Kind.EMBEDDING, entry.sha256) == folder / "EasyNegative.safetensors"


def header(entries: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("x.pt", b"PK\x03\x04", "pickled weights can run any code"),
        ("x.bin", b"", "pickled weights can run any code"),
        ("x.safetensors", b"PK\x03\x04" + bytes(30), "is a pickle with the name of a .safetensors file"),
        ("x.safetensors", b"", "is truncated or not a safetensors file"),
        ("x.safetensors", embedding()[:-1], "bytes: download it again"),
        ("x.safetensors", save({"a": torch.zeros(1, 2), "b": torch.zeros(1, 2)}), "it has 2 tensors (a, b)"),
        ("x.safetensors", save({"t5xxl": torch.zeros(1, 2)}), "it is for SD 3"),
        ("x.safetensors", save({"x": torch.zeros(1, 2, 3)}), "its tensor has the shape (1, 2, 3)"),
        ("x.safetensors", save({"x": torch.zeros(76, 8)}), "it has 76 vectors, the limit is 75"),
        ("x.safetensors", save({"x": torch.zeros(0, 8)}), "it has 0 vectors"),
        ("x.safetensors", save({"x": torch.zeros(1, 9_000)}), "its tensor has the shape (1, 9000)"),
        ("x.safetensors", save({"x": torch.zeros(1, 8, dtype=torch.int8)}), "it is stored as I8"),
        (
            "x.safetensors",
            save({"clip_l": torch.zeros(1, 8), "clip_g": torch.zeros(2, 8)}),
            "have different numbers of vectors",
        ),
        # A header that promises more than there is, or less.
        (
            "x.safetensors",
            header({"x": {"dtype": "F32", "shape": [1, 8], "data_offsets": [0, 1 << 40]}}),
            "bytes",
        ),
        (
            "x.safetensors",
            header({"x": {"dtype": "F32", "shape": [-1, 8], "data_offsets": [0, 0]}}),
            "vectors",
        ),
        ("a(b).safetensors", embedding(), 'its name has "("'),
    ],
)
def test_what_is_wrong_with_a_file_is_one_sentence_and_harms_no_other(
    tmp_path: Path, name: str, data: bytes, problem: str
) -> None:
    folder = tmp_path / "embeddings"
    folder.mkdir()
    (folder / "good.safetensors").write_bytes(embedding())
    (folder / name).write_bytes(data)
    files = store(folder, tmp_path)
    [bad] = [entry for entry in files.index.files if entry.problem]
    assert problem in bad.problem
    assert "\n" not in bad.problem
    assert not by_name(files)["good"].problem


def test_a_large_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_files, "MAX_BYTES", 100)
    (tmp_path / "x.safetensors").write_bytes(embedding())
    assert "the limit is 100" in by_name(store(tmp_path, tmp_path))["x"].problem


def test_two_files_of_one_name_are_told_and_none_is_chosen_by_chance(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.safetensors").write_bytes(embedding(fill=ord(folder)))
    assert "two files have this name" in by_name(store(tmp_path, tmp_path))["x"].problem


def test_a_file_that_is_replaced_is_another_one_and_the_index_says_so(tmp_path: Path) -> None:
    place = tmp_path / "x.safetensors"
    place.write_bytes(embedding())
    files = store(tmp_path, tmp_path)
    before = job("a <x>", files)
    assert files.provide(before) == before
    first = files.index
    files.look()
    assert files.index is first, "nothing changed"
    place.write_bytes(embedding(fill=1.0))
    files.look()
    assert files.index.digest != first.digest
    assert job("a <x>", files).id != before.id
    with pytest.raises(MissingFileError, match='lacks embedding "x"'):
        files.provide(before)


def test_a_file_that_another_one_overwrites_with_its_size_and_time_is_another_one(tmp_path: Path) -> None:
    """As `cp -p` does: the inode stays, too."""
    place = tmp_path / "x.safetensors"
    place.write_bytes(embedding())
    before = place.stat()
    files = store(tmp_path, tmp_path)
    first = files.index
    # The clock of a file system may stand still between two writes.
    while place.stat().st_ctime_ns == before.st_ctime_ns:
        place.write_bytes(embedding(fill=1.0))
        os.utime(place, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = place.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (
        before.st_size,
        before.st_mtime_ns,
        before.st_ino,
    )
    files.look()
    assert files.index.digest != first.digest


def test_a_lora_has_its_name_with_accents_composed(tmp_path: Path) -> None:
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "e\u0301te\u0301.safetensors").write_bytes(lora())
    assert list(by_name(FileStore({Kind.LORA: [str(tmp_path / "loras")]}, tmp_path))) == ["\u00e9t\u00e9"]


def test_a_job_that_asks_for_a_new_file_makes_a_worker_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, other = store(tmp_path, tmp_path), tmp_path / "other"
    other.mkdir()
    (tmp_path / "x.safetensors").write_bytes(embedding())
    asked = job("a <x>", store(tmp_path, tmp_path))
    with pytest.raises(MissingFileError):
        files.provide(asked)  # It has looked just now.
    monkeypatch.setattr(file_store, "ASKED_EVERY_S", -1.0)
    assert files.provide(asked) == asked
    assert store("", tmp_path).provide(job("a cat", files)).file_hashes == {}
    with pytest.raises(MissingFileError):
        store("", tmp_path).provide(asked)


def test_a_job_that_was_sent_before_any_worker_was_up_means_the_files_of_its_worker(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(embedding())
    files = store(tmp_path, tmp_path)
    opened = Job(prompt="a <x>", seed=1).opened()
    assert list(files.provide(opened).file_hashes) == ["embedding:x"]


def test_a_folder_that_is_not_there_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="which SMALLCAT_EMBEDDINGS names, is not there: make it"):
        store(tmp_path / "nowhere", tmp_path)
    for kind, setting in ((Kind.VAE, "SMALLCAT_VAES"), (Kind.LORA, "SMALLCAT_LORAS")):
        with pytest.raises(SettingsError, match=rf"nowhere, which {setting} names, .* correct {setting}\."):
            FileStore({kind: [str(tmp_path / "nowhere")]}, tmp_path)


class FakeBucket:
    """Objects by address: bytes, and when they were put."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        self.objects = {uri: (data, 1.0) for uri, data in objects.items()}
        self.opened: list[str] = []
        #: Whether it cannot be listed; and what opening an object raises.
        self.fails = False
        self.error: Exception | None = None

    def listed(self, address: str) -> Iterator[StoredObject]:
        if self.fails:
            raise StorageError("out of reach")
        for uri, (data, put_at) in self.objects.items():
            if uri.startswith(f"{address}/"):
                yield StoredObject(uri, put_at, len(data), f"{len(data)} {put_at}")

    @contextmanager
    def open(self, uri: str) -> Iterator[IO[bytes]]:
        self.opened.append(uri)
        if self.error:
            raise self.error
        yield io.BytesIO(self.objects[uri][0])


def test_files_in_a_bucket_are_read_once_and_again_when_they_are_replaced(tmp_path: Path) -> None:
    uri = "s3://b/embeddings/x.safetensors"
    bucket = FakeBucket({uri: embedding(), "s3://b/other/y.safetensors": embedding()})
    files = store("s3://b/embeddings", tmp_path, remote_of=lambda _: bucket)
    entry = by_name(files)["x"]
    files.look()
    assert bucket.opened == [uri]
    assert not list((tmp_path / "files").glob("*.safetensors")), "none is kept that no job needs"
    bucket.objects[uri] = embedding(fill=1.0), 2.0
    files.look()
    assert bucket.opened == [uri, uri]
    assert by_name(files)["x"].sha256 != entry.sha256
    # Another worker of this machine, and the next start, know it already.
    again = store("s3://b/embeddings", tmp_path, remote_of=lambda _: bucket)
    assert again.index == files.index
    assert bucket.opened == [uri, uri]
    (tmp_path / "files" / "known.json").write_text("[")
    assert store("s3://b/embeddings", tmp_path, remote_of=lambda _: bucket).index == files.index
    assert bucket.opened == [uri, uri, uri]
    bucket.fails = True
    with pytest.raises(StorageError):
        files.look()
    assert by_name(files)["x"].sha256 != entry.sha256, "what is known stays"


def test_a_file_in_a_bucket_is_fetched_when_a_job_needs_it_and_kept(tmp_path: Path) -> None:
    uri = "s3://b/e/x.safetensors"
    bucket = FakeBucket({uri: embedding(), "s3://b/e/y.safetensors": embedding(fill=1.0)})
    files = store("s3://b/e", tmp_path, remote_of=lambda _: bucket)
    bucket.opened.clear()
    asked = job("a <x>", files)
    assert bucket.opened == []
    assert files.provide(asked) == asked
    path = files.path(Kind.EMBEDDING, by_name(files)["x"].sha256)
    assert path is not None
    assert path.read_bytes() == embedding()
    # Neither this worker nor another one of the machine fetches it again; one whose cache was emptied does.
    store("s3://b/e", tmp_path, remote_of=lambda _: bucket).provide(asked)
    assert bucket.opened == [uri]
    path.unlink()
    assert files.path(Kind.EMBEDDING, by_name(files)["x"].sha256) == path
    assert bucket.opened == [uri, uri]
    opened = Job(prompt="a <y>", seed=1).opened()
    assert list(files.provide(opened).file_hashes) == ["embedding:y"]
    assert bucket.opened == [uri, uri, "s3://b/e/y.safetensors"]


def test_a_file_that_is_on_this_disk_is_not_fetched(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x.safetensors").write_bytes(lora())
    bucket = FakeBucket({"s3://b/l/other.safetensors": lora()})
    for places in ([str(tmp_path / "mine"), "s3://b/l"], ["s3://b/l", str(tmp_path / "mine")]):
        files = FileStore({Kind.LORA: places}, tmp_path / "cache", lambda _: bucket)
        sha256 = by_name(files)["other"].sha256
        assert files.path(Kind.LORA, sha256) == tmp_path / "mine" / "x.safetensors"


@pytest.mark.parametrize(
    "error",
    [
        StorageError("out of reach"),
        PermanentStorageError("Access Denied"),
        UnknownJobError("it was deleted"),
        OSError(28, "No space left on device"),
    ],
)
def test_a_job_whose_file_cannot_be_fetched_goes_back_without_an_attempt(
    tmp_path: Path, error: Exception
) -> None:
    bucket = FakeBucket({"s3://b/e/x.safetensors": embedding()})
    files = store("s3://b/e", tmp_path, remote_of=lambda _: bucket)
    asked, sha256 = job("a <x>", files), by_name(files)["x"].sha256
    bucket.error = error
    with pytest.raises(MissingFileError, match=r"cannot fetch s3://b/e/x\.safetensors: "):
        files.provide(asked)
    # Where the job's file goes in between, the job alone fails, and is tried again: not the engine.
    assert files.path(Kind.EMBEDDING, sha256) is None
    assert [path.name for path in (tmp_path / "files").iterdir()] == ["known.json"]
    bucket.error = None
    assert files.provide(asked) == asked


def test_an_object_that_was_replaced_since_the_last_look_is_no_other_ones_picture(tmp_path: Path) -> None:
    """Nor where what is kept of it is wrong, whoever wrote that."""
    uri = "s3://b/e/x.safetensors"
    bucket = FakeBucket({uri: embedding()})
    files = store("s3://b/e", tmp_path, remote_of=lambda _: bucket)
    asked = job("a <x>", files)
    bucket.objects[uri] = embedding(fill=1.0), 1.0
    with pytest.raises(MissingFileError, match="is another file than it was"):
        files.provide(asked)
    files.look()
    assert by_name(files)["x"].sha256 != asked.file_hashes["embedding:x"]
    with pytest.raises(MissingFileError, match='lacks embedding "x"'):
        files.provide(asked)


def test_a_worker_that_cannot_look_for_a_file_gives_the_job_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_store, "ASKED_EVERY_S", -1.0)
    bucket = FakeBucket({})
    files = store("s3://b/e", tmp_path, remote_of=lambda _: bucket)
    (tmp_path / "x.safetensors").write_bytes(embedding())
    asked = job("a <x>", store(tmp_path, tmp_path))
    bucket.fails = True
    with pytest.raises(MissingFileError, match="and cannot look for it: out of reach"):
        files.provide(asked)


def test_a_worker_that_stops_does_not_wait_for_a_file(tmp_path: Path) -> None:
    bucket = FakeBucket({"s3://b/e/x.safetensors": embedding()})
    files = store("s3://b/e", tmp_path, remote_of=lambda _: bucket)
    asked = job("a <x>", files)
    files.stop()
    with pytest.raises(EngineStoppedError):
        files.provide(asked)
    assert [path.name for path in (tmp_path / "files").iterdir()] == ["known.json"]


def test_an_object_that_is_too_large_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = dataclasses.replace(KINDS[Kind.EMBEDDING], most=100)
    monkeypatch.setattr(bucket_files, "KINDS", {Kind.EMBEDDING: small})
    bucket = FakeBucket({"s3://b/e/x.safetensors": embedding()})
    files = store("s3://b/e", tmp_path, remote_of=lambda _: bucket)
    assert "more than 100 bytes" in by_name(files)["x"].problem
    assert [path.name for path in (tmp_path / "files").iterdir()] == ["known.json"]


# --- LoRAs ----------------------------------------------------------------------------------------------


def lora(rank: int = 2, **more: torch.Tensor) -> bytes:
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors = {
        f"{module}.lora_A.weight": torch.ones(rank, 768),
        f"{module}.lora_B.weight": torch.ones(8, rank),
    }
    return save({f"unet.{name}": each for name, each in tensors.items()} | more)


def test_loras_are_found_by_name_and_what_is_wrong_with_one_is_told(tmp_path: Path) -> None:
    for name in ("mine", "pixel-art-xl", "peft"):
        (tmp_path / "loras" / name).mkdir(parents=True)
    (tmp_path / "loras" / "detail v1.2.safetensors").write_bytes(lora())
    (tmp_path / "loras" / "mine" / "pytorch_lora_weights.safetensors").write_bytes(lora(3))
    (tmp_path / "loras" / "peft" / "adapter_model.safetensors").write_bytes(lora(4))
    (tmp_path / "loras" / "peft" / "adapter_config.json").write_text('{"lora_alpha": 4}')
    (tmp_path / "loras" / "old.ckpt").write_bytes(b"PK")
    (tmp_path / "loras" / "loha.safetensors").write_bytes(lora(**{"x.hada_w1_a": torch.ones(1)}))
    files = FileStore({Kind.LORA: [str(tmp_path / "loras")]}, tmp_path)
    entries = by_name(files)
    assert {name: entry.architecture for name, entry in entries.items() if not entry.problem} == {
        "detail v1.2": "SD 1.x",
        "mine": "SD 1.x",
        "peft": "SD 1.x",
    }
    assert "it is a LoHa" in entries["loha"].problem
    assert "pickled" in entries["old"].problem
    # Civitai's hash is of the file alone; a config that comes with a file is part of its content.
    data = (tmp_path / "loras" / "detail v1.2.safetensors").read_bytes()
    # AUTOMATIC1111 1.10.1, modules/hashes.py: of all behind the header, whose length is in the first 8 bytes.
    behind = data[8 + int.from_bytes(data[:8], "little") :]
    assert by_name(files)["detail v1.2"].auto_v3 == hashlib.sha256(behind).hexdigest()[:12]
    assert entries["detail v1.2"].auto_v2 == hashlib.sha256(data).hexdigest()[:10].upper()
    (tmp_path / "loras" / "peft" / "adapter_config.json").write_text('{"lora_alpha": 80}')
    files.look()
    assert by_name(files)["peft"].sha256 != entries["peft"].sha256
    assert by_name(files)["mine"] == entries["mine"]


#: Puts the files of a folder somewhere and says where: the place, and the bucket.
Put = Callable[[dict[str, bytes]], tuple[str, FakeBucket]]


@pytest.fixture(params=["folder", "file", "bucket", "object", "hub"])
def put(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Put:
    def at(files: dict[str, bytes]) -> tuple[str, FakeBucket]:
        bucket = FakeBucket({f"s3://b/loras/cat/{name}": data for name, data in files.items()})
        weights = next(name for name in files if name.endswith(".safetensors"))
        if request.param in ("bucket", "object"):
            return "s3://b/loras" + (f"/cat/{weights}" if request.param == "object" else "/"), bucket
        if request.param == "hub":
            fake_hub(tmp_path / "hub", list(files), monkeypatch, files)
            return "a/cat", bucket
        (tmp_path / "loras" / "cat").mkdir(parents=True)
        for name, data in files.items():
            (tmp_path / "loras" / "cat" / name).write_bytes(data)
        return str(tmp_path / "loras" / (f"cat/{weights}" if request.param == "file" else "")), bucket

    return at


PEFT_CONFIG = {
    "peft_type": "LORA",
    "lora_alpha": 12,
    "alpha_pattern": {"attn2.to_k": 6},
    "use_rslora": True,
    "use_dora": True,
}


def of_peft() -> bytes:
    module = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    return save(
        {
            f"{module}.lora_A.weight": torch.ones(2, 768),
            f"{module}.lora_B.weight": torch.ones(8, 2),
            f"{module}.lora_magnitude_vector": torch.ones(8),
        }
    )


def test_pefts_config_is_read_wherever_the_file_is(tmp_path: Path, put: Put) -> None:
    """`adapter_model.safetensors` and `adapter_config.json`, as PEFT 0.21 saves them."""
    config = json.dumps(PEFT_CONFIG).encode()
    place, bucket = put({"adapter_config.json": config, "adapter_model.safetensors": of_peft()})
    files = FileStore({Kind.LORA: [place]}, tmp_path / "cache", lambda _: bucket)
    [entry] = files.index.files
    assert (entry.name, entry.architecture, entry.problem) == ("cat", "SD 1.x", "")
    # The same one wherever it is.
    sha256 = hashlib.sha256(of_peft()).hexdigest()
    assert entry.sha256 == hashlib.sha256(json.dumps([sha256, config.decode()]).encode()).hexdigest()
    path = files.path(Kind.LORA, entry.sha256)
    assert path is not None
    assert lora_header.read(path).settings == {"": Settings(12.0, {"attn2.to_k": 6.0}, root=True, dora=True)}


@pytest.mark.parametrize("data", [of_peft(), lora()], ids=["its names", "other names"])
def test_pefts_file_without_its_config_is_refused_wherever_it_is(
    tmp_path: Path, put: Put, data: bytes
) -> None:
    place, bucket = put({"adapter_model.safetensors": data})
    [entry] = FileStore({Kind.LORA: [place]}, tmp_path / "cache", lambda _: bucket).index.files
    assert "lacks alpha: keep it as adapter_model.safetensors in a folder with its adapter" in entry.problem


@pytest.mark.parametrize(
    "config",
    [
        b'{"lora_alpha": 1' + b"0" * 400 + b"}",
        b'{"lora_alpha": 1' + b"0" * 5_000 + b"}",
        b'{"alpha_pattern": {"to_k": 1' + b"0" * 400 + b"}}",
        b'{"lora_alpha": NaN}',
        b'{"lora_alpha": -1e9}',
        b'{"lora_alpha": "\xe9"}',
        b"[" * 100_000,
        b"[1]",
        b'""',
        b'[["lora_alpha", 1]]',
        b'{"use_rslora": "false"}',
    ],
    ids=lambda config: config[:20].decode("latin-1"),
)
def test_a_hostile_config_is_the_problem_of_its_own_file_alone(
    tmp_path: Path, put: Put, config: bytes
) -> None:
    files = {"adapter_config.json": config, "adapter_model.safetensors": of_peft()}
    place, bucket = put(files)
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "good.safetensors").write_bytes(lora())
    places = {Kind.LORA: [place, str(tmp_path / "good")]}
    found = by_name(FileStore(places, tmp_path / "cache", lambda _: bucket))
    assert found["cat"].problem
    assert not found["good"].problem


def test_a_hostile_config_of_a_vae_is_its_own_problem(tmp_path: Path) -> None:
    (tmp_path / "vaes" / "mine").mkdir(parents=True)
    (tmp_path / "vaes" / "mine" / "diffusion_pytorch_model.safetensors").write_bytes(embedding())
    for config, problem in (
        (b'{"author": "\xe9"}', "its config.json is no UTF-8: download it again"),
        (b'""', "its config.json is no JSON object: download it again"),
        (b'[["_class_name", "AutoencoderKL"]]', "its config.json is no JSON object: download it again"),
    ):
        (tmp_path / "vaes" / "mine" / "config.json").write_bytes(config)
        [entry] = FileStore({Kind.VAE: [str(tmp_path / "vaes")]}, tmp_path / "cache").index.files
        assert entry.problem == problem


def test_what_an_author_wrote_moves_no_cursor_and_forges_no_line(tmp_path: Path) -> None:
    """The problem of a file is shown at terminals, and announced to all."""
    (tmp_path / "loras" / "cat").mkdir(parents=True)
    (tmp_path / "loras" / "cat" / "adapter_model.safetensors").write_bytes(of_peft())
    config = {"bias": "\x1b[2J\nall is well\u202e" + "x" * 100_000}
    (tmp_path / "loras" / "cat" / "adapter_config.json").write_text(json.dumps(config))
    [entry] = FileStore({Kind.LORA: [str(tmp_path / "loras")]}, tmp_path / "cache").index.files
    assert r"bias is \x1b[2J\nall is well\u202exxx" in entry.problem
    assert entry.problem.isprintable()
    assert len(entry.problem) < 200


def test_a_config_in_a_bucket_that_changes_makes_another_file(tmp_path: Path) -> None:
    uri = "s3://b/loras/cat/adapter_config.json"
    bucket = FakeBucket({uri: b"{}", "s3://b/loras/cat/adapter_model.safetensors": of_peft()})
    files = FileStore({Kind.LORA: ["s3://b/loras"]}, tmp_path, lambda _: bucket)
    before = files.index
    bucket.objects[uri] = b'{"lora_alpha": 1}', 2.0
    files.look()
    assert [each.sha256 for each in files.index.files] != [each.sha256 for each in before.files]
    # The next start knows both files without reading them.
    opened = len(bucket.opened)
    again = FileStore({Kind.LORA: ["s3://b/loras"]}, tmp_path, lambda _: bucket)
    assert again.index == files.index
    assert len(bucket.opened) == opened


def test_a_vaes_config_is_part_of_it_in_a_bucket_too(tmp_path: Path) -> None:
    (tmp_path / "vaes" / "mine").mkdir(parents=True)
    bucket = FakeBucket({})
    for name, data in (("config.json", b"{}"), ("diffusion_pytorch_model.safetensors", embedding())):
        (tmp_path / "vaes" / "mine" / name).write_bytes(data)
        bucket.objects[f"s3://b/vaes/mine/{name}"] = data, 1.0
    near = FileStore({Kind.VAE: [str(tmp_path / "vaes")]}, tmp_path / "cache")
    far = FileStore({Kind.VAE: ["s3://b/vaes"]}, tmp_path / "cache", lambda _: bucket)
    assert by_name(far)["mine"].sha256 == by_name(near)["mine"].sha256


def test_a_bucket_is_listed_as_a_folder_is(tmp_path: Path) -> None:
    """The better one of several formats; general names; and a problem that says where the file is."""
    names = ("x.safetensors", "x.fp16.safetensors", "x.ckpt", "sub/model.safetensors", "y.pt", "readme.txt")
    bucket = FakeBucket(
        {f"s3://b/e/{name}": embedding() for name in names} | {"s3://b/e/z.safetensors": b"x"}
    )
    far = by_name(store("s3://b/e/", tmp_path / "cache", remote_of=lambda _: bucket))
    for uri, (data, _) in bucket.objects.items():
        path = tmp_path / "e" / uri.removeprefix("s3://b/e/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    near = by_name(store(tmp_path / "e", tmp_path / "cache"))
    assert far.keys() == near.keys() == {"x", "sub", "y", "z"}
    assert far["z"].problem == near["z"].problem.replace(str(tmp_path / "e"), "s3://b/e")
    assert {name: each for name, each in far.items() if name != "z"} == {
        name: each for name, each in near.items() if name != "z"
    }


def test_a_place_may_be_one_lora(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    path = tmp_path / "mine" / "pytorch_lora_weights.safetensors"
    path.write_bytes(lora())
    (tmp_path / "mine" / "other.safetensors").write_bytes(lora())
    assert list(by_name(FileStore({Kind.LORA: [str(path)]}, tmp_path))) == ["mine"]


@pytest.mark.parametrize(
    ("place", "names", "name"),
    [
        (
            "latent-consistency/lcm-lora-sdxl",
            ["README.md", "pytorch_lora_weights.safetensors"],
            "lcm-lora-sdxl",
        ),
        ("nerijs/pixel-art-xl", ["pixel-art-xl.safetensors", "sub/x.safetensors"], "pixel-art-xl"),
        ("a/b/sub/two v1.safetensors", ["sub/one.safetensors", "sub/two v1.safetensors"], "two v1"),
        ("a/b", ["one.safetensors", "pytorch_lora_weights.safetensors"], "b"),
    ],
)
def test_a_lora_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, names: list[str], name: str
) -> None:
    fake_hub(tmp_path / "snapshots" / "0123abcd", names, monkeypatch)
    assert list(by_name(FileStore({Kind.LORA: [place]}, tmp_path / "cache"))) == [name]


@pytest.mark.parametrize(
    ("place", "names", "part"),
    [
        ("a/b", ["one.safetensors", "two.safetensors"], r"has 2 \.safetensors files \(one.safetensors, two"),
        ("a/b", ["x.bin"], r"has 0 \.safetensors files \(none\)"),
        ("a/b/c.safetensors", ["d.safetensors"], "a/b/c.safetensors, which has no c.safetensors: correct it"),
        ("a/gone", [], "which is neither here nor can be downloaded from the hub"),
        ("nowhere", [], "is not there: make it"),
    ],
)
def test_a_place_on_the_hub_that_is_no_lora_stops_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, names: list[str], part: str
) -> None:
    fake_hub(tmp_path / "snapshots", names, monkeypatch)
    with pytest.raises(SettingsError, match=part):
        FileStore({Kind.LORA: [place]}, tmp_path / "cache")


def fake_hub(
    folder: Path,
    names: list[str],
    monkeypatch: pytest.MonkeyPatch,
    contents: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """A hub on which every repository but "a/gone" has these files: LoRAs, unless `contents` says another."""

    def list_repo_files(repo: str) -> list[str]:
        if repo == "a/gone":
            raise OSError("no such repository")
        return names

    def snapshot_download(repo: str, allow_patterns: list[str] | None = None, **_: Any) -> str:
        list_repo_files(repo)
        folder.mkdir(parents=True)
        for name in {*names} & {*(allow_patterns or ())}:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(contents.get(name, lora()))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "list_repo_files", list_repo_files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def test_a_lora_of_the_hub_is_found_in_the_cache_where_the_hub_is_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`HF_HUB_OFFLINE` of huggingface_hub, which tests have on."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1" / "pixel.safetensors"
    snapshot.parent.mkdir(parents=True)
    snapshot.write_bytes(lora())
    (tmp_path / "models--a--b" / "refs").mkdir()
    (tmp_path / "models--a--b" / "refs" / "main").write_text("1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert list(by_name(FileStore({Kind.LORA: ["a/b"]}, tmp_path / "cache"))) == ["pixel"]
