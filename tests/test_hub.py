"""Model folders: what is written is read back, and nothing else is."""

import hashlib
import json

import pytest
import safetensors.torch
import torch

from sagan_kernels import hub
from sagan_kernels.models import Discriminator, Generator

TINY = {"resolution": 32, "num_classes": 3, "base_channels": 2, "attention_at": ()}


@pytest.fixture
def generator():
    return Generator(z_dim=5, **TINY)


@pytest.fixture
def folder(tmp_path, generator):
    """Both networks of a tiny model."""
    Discriminator(**TINY).save_pretrained(tmp_path)
    return generator.save_pretrained(tmp_path, ["cat", "dog", "axolotl ✓"])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def edit(folder, **changes):
    """Change config.json; None deletes a key."""
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def rewrite(folder, content, part="generator"):
    """Put `content` in place of a part's weights, with a sha256 that fits."""
    (folder / f"{part}.safetensors").write_bytes(content)
    sums = json.loads((folder / "config.json").read_text("utf-8"))["sha256"]
    edit(folder, sha256=sums | {f"{part}.safetensors": hashlib.sha256(content).hexdigest()})


@pytest.mark.parametrize(
    "settings", [{}, {"spectral_norm": False, "residual": False}, {"num_classes": 0}], ids=str
)
@pytest.mark.parametrize("cls", [Generator, Discriminator])
def test_saved_network_is_read_back_bit_for_bit(tmp_path, cls, settings):
    model = cls(**TINY | {"base_channels": 8, "attention_at": (16,)} | settings)
    model.save_pretrained(tmp_path)
    again = cls.from_pretrained(str(tmp_path))
    assert again.config == model.config
    assert not again.training
    assert again.class_names is None
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_both_parts_share_a_folder(folder):
    assert names(folder) == ["config.json", "discriminator.safetensors", "generator.safetensors"]
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert (config["format_version"], config["library_name"]) == (1, "sagan-kernels")
    assert Generator.from_pretrained(folder).class_names == ["cat", "dog", "axolotl ✓"]
    Discriminator(**TINY).save_pretrained(folder)  # without names: those of the folder stay
    assert Discriminator.from_pretrained(folder).class_names == ["cat", "dog", "axolotl ✓"]
    Generator.from_pretrained(folder).save_pretrained(folder / "copy")  # a loaded network keeps its names
    assert Generator.from_pretrained(folder / "copy").class_names == ["cat", "dog", "axolotl ✓"]


def test_half_precision_is_read_as_fp32_and_small_tensors_stay_exact(tmp_path, generator):
    generator.norm.running_var.fill_(1e6)  # beyond fp16
    generator.save_pretrained(tmp_path, dtype=torch.float16)
    stored = safetensors.torch.load_file(tmp_path / "generator.safetensors")
    assert stored["to_image.parametrizations.weight.original"].dtype == torch.float16
    again = Generator.from_pretrained(tmp_path).state_dict()
    for key, value in generator.state_dict().items():
        assert again[key].dtype == value.dtype
        expected = value if value.ndim < 2 else value.half().float()
        assert torch.equal(again[key], expected), key


def test_a_weight_beyond_half_precision_is_refused(tmp_path, generator):
    with torch.no_grad():
        generator.blocks[0].norm1.gain[1, 1] = 1e5
    with pytest.raises(ValueError, match=r"blocks\.0\.norm1\.gain must fit into torch\.float16, got 1e\+05"):
        generator.save_pretrained(tmp_path, dtype=torch.float16)
    assert names(tmp_path) == []


def test_class_names_must_fit_the_labels(tmp_path, folder, generator):
    with pytest.raises(ValueError, match="save_pretrained: class_names must be 3 names, got 2"):
        generator.save_pretrained(tmp_path, ["cat", "dog"])
    edit(folder, class_names=["cat"])
    with pytest.raises(ValueError, match=r"config\.json: class_names must be 3 names, got 1"):
        Generator.from_pretrained(folder)


@pytest.mark.parametrize("cut", [0, 4, 300, -1])
def test_truncated_weights_are_refused(folder, cut):
    path = folder / "generator.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"generator\.safetensors: sha256 must be .* truncated or altered"):
        Generator.from_pretrained(folder)
    rewrite(folder, path.read_bytes())  # with a sum that fits, the format itself tells
    with pytest.raises(ValueError, match=r"generator\.safetensors: must be a safetensors file, got"):
        Generator.from_pretrained(folder)


def test_one_altered_bit_is_refused_and_the_other_part_still_loads(folder):
    path = folder / "generator.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="truncated or altered"):
        Generator.from_pretrained(folder)
    Discriminator.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"format_version": 2, "library_version": "9.1"},
            r"at most 1, got 2, written by sagan-kernels 9\.1; pip",
        ),
        ({"format_version": "1"}, "format_version must be a whole number from 1, got '1'"),
        ({"format_version": None}, "must have the key 'format_version'"),
        ({"library_name": "diffusers"}, "library_name must be 'sagan-kernels', got 'diffusers'"),
        ({"library_name": None}, "must have the key 'library_name'"),
        ({"sha256": None}, "must have the key 'sha256'"),
        ({"sha256": {}}, r"must have the key 'generator\.safetensors', got nothing"),
        ({"sha256": []}, "'sha256' must be an object"),
        ({"generator": None}, "must have the key 'generator'"),
        ({"generator": 3}, "'generator' must be an object, got 3"),
        ({"generator": {"resolution": 33}}, "generator must be arguments of Generator, got .*got 33"),
        ({"generator": {"resolution": 32, "depth": 3}}, "arguments of Generator, got .*'depth'"),
        ({"generator": {"resolution": 32, "widths": 3}}, "arguments of Generator, got"),
        ({"class_names": ["cat", 2, "dog"]}, "class_names must be a list of texts"),
    ],
    ids=str,
)
def test_a_config_that_is_not_ours_is_refused(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}") as caught:
        Generator.from_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", b"\xff\xfe{}", "[" * 100_000], ids=lambda text: repr(text[:4])
)
def test_a_config_that_is_not_a_json_object_is_refused(folder, text):
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"config\.json: must be"):
        Generator.from_pretrained(folder)


def test_tensors_that_do_not_fit_are_named(folder, generator):
    tensors = generator.state_dict()
    del tensors["norm.weight"]
    tensors["extra"] = torch.zeros(2)
    tensors["norm.bias"] = torch.zeros(7)
    rewrite(folder, safetensors.torch.save(tensors))
    told = r"1 missing: norm\.weight; 1 unexpected: extra; 1 misshapen: norm\.bias \(7,\) for \(8,\)"
    with pytest.raises(ValueError, match=told):
        Generator.from_pretrained(folder)


@pytest.mark.parametrize("with_config", [True, False])
def test_a_folder_of_pickles_is_refused_with_the_reason(folder, with_config):
    for part in ("generator", "discriminator"):
        (folder / f"{part}.safetensors").unlink()
    torch.save({}, folder / "generator.pth")
    if not with_config:
        (folder / "config.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"generator\.pth, a pickle, refused because loading one can run any"
    ):
        Generator.from_pretrained(folder)


def test_a_pickle_under_a_safetensors_name_is_not_loaded(folder):
    torch.save(Generator(z_dim=5, **TINY).state_dict(), folder / "model.pt")
    rewrite(folder, (folder / "model.pt").read_bytes())
    with pytest.raises(ValueError, match="must be a safetensors file"):
        Generator.from_pretrained(folder)


def test_a_file_in_place_of_a_folder_is_refused(folder):
    torch.save({}, folder / "model.pt")
    with pytest.raises(ValueError, match=r"got model\.pt, a pickle, refused"):
        Generator.from_pretrained(folder / "model.pt")
    with pytest.raises(ValueError, match=r"got the file generator\.safetensors; give the folder"):
        Generator.from_pretrained(folder / "generator.safetensors")


def test_what_is_not_there_is_named(tmp_path, folder):
    (folder / "generator.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"must be there, got config\.json, discriminator\.safetensors"
    ):
        Generator.from_pretrained(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"config\.json: must be there, got nothing"):
        Generator.from_pretrained(tmp_path / "empty")
    with pytest.raises(ValueError, match="must be a zoo entry or a model folder, got 'nowhere/at all'"):
        hub.resolve("nowhere/at all")


def test_save_does_not_overwrite_a_model_of_another_library(folder, generator):
    edit(folder, library_name="diffusers")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="got 'diffusers'"):
        generator.save_pretrained(folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("failing", ["generator.safetensors", "config.json"])
def test_a_disk_that_fills_up_leaves_the_old_model_loadable(folder, generator, monkeypatch, failing):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    write = type(folder).write_bytes if failing != "config.json" else type(folder).write_text

    def fill(path, content, **options):
        write(path, content[:10], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(folder), write.__name__, fill)
    with torch.no_grad():
        generator.norm.bias += 1
    with pytest.raises(OSError, match=f"{failing}: could not be written, No space left on device"):
        generator.save_pretrained(folder)
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    Generator.from_pretrained(folder)


def test_folder_with_other_class_names_is_left_as_it_is(tmp_path):
    first = Generator(32, 3, z_dim=4, base_channels=2, attention_at=())
    first.save_pretrained(tmp_path, ["a", "b", "c"])
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ValueError, match="class_names must be 2 names, got 3"):
        Generator(32, 2, z_dim=4, base_channels=2, attention_at=()).save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before


def test_whole_number_storage_is_refused(tmp_path):
    model = Generator(32, 0, z_dim=4, base_channels=2, attention_at=())
    with pytest.raises(ValueError, match=r"got torch\.int8"):
        model.save_pretrained(tmp_path, dtype=torch.int8)


def test_run_folder_is_pointed_to_its_best_networks(tmp_path):
    Generator(32, 0, z_dim=4, base_channels=2, attention_at=()).save_pretrained(tmp_path / "best")
    with pytest.raises(ValueError, match=r"got a run folder; give .*best"):
        Generator.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="got an empty name"):
        Generator.from_pretrained("")
