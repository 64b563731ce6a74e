"""The recipe on a few made-up emoji: captions are true, pictures show their scenes, training resumes."""

import dataclasses
import io
import json
import random
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from worker.demo.training import autoencoder, packages, train
from worker.demo.training.captions import BACKGROUNDS, BIG, MEDIUM, SMALL, SceneWriter, plural
from worker.demo.training.recipe import Clock, Recipe, rate_factor
from worker.demo.training.scenes import Composer, SceneBatch
from worker.demo.training.subjects import clean, common_words, load_subjects
from worker.demo.training.tokenizer import MAX_TOKENS, train_tokenizer

CPU = torch.device("cpu")
TINY = Recipe(
    compiled=False,
    scenes=16,
    other_scenes=4,
    other_sizes=((96, 96),),
    other_sizes_from=0.0,
    other_size_every=2,
    autoencoder_channels=(8, 8, 8, 8),
    denoiser_channels=(48, 48, 48),
    text_width=48,
    text_layers=1,
    latent_channels=4,
    autoencoder_batch=2,
    denoiser_batch=2,
    classifier_batch=2,
)


class CountingClock(Clock):
    """A clock that is over after three checks, however slow the machine."""

    checks = 0

    @property
    def over(self):
        self.checks += 1
        return self.checks > 3


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with the two npm tarballs, small: every common subject, drawn as a disc of its own colour."""
    folder = tmp_path_factory.mktemp("npm")
    entries, pictures = [], {}
    for index, label in enumerate(dict.fromkeys(common_words().values())):
        code = f"{0xF0000 + index:x}"
        entries.append(
            {"label": label, "hexcode": code.upper(), "group": 3, "tags": ["thing", f"tag{index}"]}
        )
        image = Image.new("RGBA", (256, 256))
        colour = tuple(random.Random(index).randrange(256) for _ in range(3))
        ImageDraw.Draw(image).ellipse((16, 16, 239, 239), fill=colour)
        stream = io.BytesIO()
        image.save(stream, "WEBP", lossless=True)
        pictures[f"package/assets/{code}.webp"] = stream.getvalue()
    entries.append({"label": "flag: Nowhere", "hexcode": "F0000", "group": 9})
    _tarball(folder / packages.NAMES.filename, {"package/en/data.json": json.dumps(entries).encode()})
    _tarball(folder / packages.PICTURES.filename, pictures)
    return folder


def _tarball(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture(autouse=True)
def _unchecked_tarballs(monkeypatch):
    monkeypatch.setattr(packages, "fetch", lambda package, folder: folder / package.filename)


@pytest.fixture(scope="session")
def subjects(data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packages, "fetch", lambda package, folder: folder / package.filename)
        return load_subjects(data)


def test_a_tampered_package_is_refused(tmp_path, monkeypatch):
    monkeypatch.undo()
    (tmp_path / packages.NAMES.filename).write_bytes(b"not the package")
    with pytest.raises(ValueError, match="Delete it and run again"):
        packages.fetch(packages.NAMES, tmp_path)


def test_names_are_unique_and_flags_are_left_out(subjects):
    names = [subject.name for subject in subjects]
    assert len(set(names)) == len(names)
    assert not any("flag" in name and "nowhere" in name for name in names)
    assert "cat" in names
    assert "car" in names  # and not "automobile", which is its synonym
    assert "automobile" in subjects[names.index("car")].synonyms


def test_names_are_cleaned():
    assert clean("Woman’s  “hat”: (red)") == "woman's hat red"
    assert [plural(name) for name in ("cat", "fox", "candy", "glasses")] == [
        "cats",
        "foxes",
        "candies",
        "glasses",
    ]


def test_equal_seeds_give_equal_scenes(subjects):
    first, second = SceneWriter(subjects, 3), SceneWriter(subjects, 3)
    assert [first.draw() for _ in range(50)] == [second.draw() for _ in range(50)]


def test_captions_are_true(subjects):
    writer = SceneWriter(subjects, 0)
    colours = list(BACKGROUNDS)
    named = 0
    for scene in (writer.draw() for _ in range(2000)):
        caption = scene.caption.replace("grey", "gray").replace("sky blue", "light blue")
        if len(scene.subjects) == 1 and scene.caption:
            words = set(caption.split())
            assert bool(words & {"small", "little", "tiny"}) == (scene.sizes[0] == SMALL)
            assert bool(words & {"big", "large", "huge"}) == (scene.sizes[0] == BIG)
        if "background" in caption:
            named += 1
            assert f"{colours[scene.background]} background" in caption
        elif f" on {colours[scene.background]}" not in caption and scene.caption:
            assert colours[scene.background] == "white"
    assert named > 300


def test_pictures_show_their_scenes(subjects, data):
    composer = Composer(subjects[:4], data, CPU)
    scenes = SceneBatch(
        torch.tensor([[0, -1], [0, -1], [0, -1], [1, 2]]),
        torch.tensor([[SMALL, MEDIUM], [MEDIUM, MEDIUM], [BIG, MEDIUM], [MEDIUM, MEDIUM]]),
        torch.tensor([0, 1, 2, 0]),
    )
    pictures = (composer.draw(scenes.layout(128, 96), 128, 96) + 1) * 127.5
    assert pictures.shape == (4, 3, 96, 128)
    for picture, index in zip(pictures, (0, 1, 2, 0), strict=True):
        assert torch.allclose(
            picture[:, 0, 0], torch.tensor(list(BACKGROUNDS.values())[index]).float(), atol=1
        )
    widths = [
        int(((picture - picture[:, :1, :1]).abs().amax(0) > 20).any(0).sum()) for picture in pictures[:3]
    ]
    for width, share in zip(widths, (0.505, 0.755, 0.955), strict=True):
        assert width == pytest.approx(96 * share, abs=0.05 * 96)
    for column, index in ((32, 1), (96, 2)):
        assert float(pictures[3][0, 48, column]) == pytest.approx(random.Random(index).randrange(256), abs=6)


def test_tokenizer_has_tokens_for_captions_and_splits_other_words(subjects):
    writer = SceneWriter(subjects, 0)
    tokenizer = train_tokenizer(writer.draw().caption for _ in range(500))
    assert tokenizer.tokenize("a small Cat") == ["a</w>", "small</w>", "cat</w>"]
    ids = tokenizer("zorgblatt 漢字 " * 40, truncation=True, padding="max_length").input_ids
    assert len(ids) == MAX_TOKENS
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id


def test_normalised_latents_have_mean_0_and_deviation_1():
    torch.manual_seed(0)
    vae = autoencoder.build_autoencoder(dataclasses.replace(TINY, latent_channels=3)).eval()
    pictures = torch.rand(8, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        autoencoder.normalise_latents(vae, pictures)
        latents = vae.encode(pictures).latent_dist.mode()
    assert torch.allclose(latents.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-3)
    assert torch.allclose(latents.std(dim=(0, 2, 3)), torch.ones(3), atol=1e-3)


def test_learning_rate_rises_holds_and_falls():
    assert rate_factor(0, 0.0) == pytest.approx(1 / 200)
    assert rate_factor(1000, 0.2) == 1.0
    assert rate_factor(1000, 1.0) == pytest.approx(0.01)


def test_a_clock_counts_earlier_runs():
    assert Clock(minutes=2, spent=2).over
    assert not Clock(minutes=2, spent=1).over
    assert Clock(minutes=2, spent=1, allowed=0).over
    assert Clock(minutes=2, spent=1).progress == pytest.approx(0.5, abs=0.01)


@pytest.mark.timeout(300)
def test_training_saves_and_resumes(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "Clock", CountingClock)
    run = train.begin(TINY, data, tmp_path, minutes=5, limit=6)
    train.make_autoencoder(run)
    train.make_classifier(run)
    train.make_denoiser(run)
    assert run.model.steps > 0

    resumed = train.begin(TINY, data, tmp_path, minutes=5, limit=6)
    resumed.load()
    assert resumed.model.steps == run.model.steps
    assert all(minutes > 0 for minutes in resumed.spent.values())
    for kept, loaded in zip(run.model.parameters, resumed.model.parameters, strict=True):
        assert torch.equal(kept, loaded)

    (tmp_path / "state.pt").unlink()
    shipped = train.begin(TINY, data, tmp_path, minutes=5, limit=6)
    shipped.load()
    for average, loaded in zip(run.model.average, shipped.model.parameters, strict=True):
        assert torch.allclose(average, loaded, atol=2e-3)
    image = shipped.pipeline()("a cat", num_inference_steps=1, output_type="np").images[0]
    assert np.isfinite(image).all()
