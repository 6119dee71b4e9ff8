"""Names of the zoo and models made from them."""

import pytest
import torch

from sagan_kernels import create_model, list_models, zoo
from sagan_kernels.models import Discriminator, Generator

NETWORK = "num_classes = 3\nbase_channels = 2\nattention_at = []\nresolution = 32\n"
RECIPE = f"[generator]\nz_dim = 5\n{NETWORK}[discriminator]\n{NETWORK}[train]\nbatch_size = 4\n"


@pytest.fixture
def zoo_folder(tmp_path, monkeypatch):
    """A zoo of three: two without weights, one with."""
    for name in ("sagan_32_dots", "sagan_32_bars"):
        (tmp_path / f"{name}.toml").write_text(RECIPE)
    (tmp_path / "sagan_32_tiny.toml").write_text(RECIPE + '[weights]\nlicense = "cc0"\nfid = 1.5\n')
    monkeypatch.setattr(zoo, "zoo_folder", lambda: tmp_path)
    Generator(32, 3, z_dim=5, base_channels=2, attention_at=()).save_pretrained(
        tmp_path / "sagan_32_tiny", list("abc")
    )
    Discriminator(32, 3, base_channels=2, attention_at=()).save_pretrained(tmp_path / "sagan_32_tiny")
    return tmp_path


def test_list_models_is_sorted_and_knows_which_have_weights(zoo_folder):
    assert list_models() == ["sagan_32_bars", "sagan_32_dots", "sagan_32_tiny"]
    assert list_models(pretrained=True) == ["sagan_32_tiny"]


def test_entry_holds_the_tables(zoo_folder):
    entry = zoo.entry("sagan_32_tiny")
    assert entry.generator["z_dim"] == 5
    assert entry.train == {"batch_size": 4}
    assert entry.data == {}
    assert entry.weights == {"license": "cc0", "fid": 1.5}
    assert entry.folder == zoo_folder / "sagan_32_tiny"
    assert zoo.entry("sagan_32_dots").weights is None


def test_the_shipped_zoo_can_be_read():
    for name in list_models():
        assert name.isidentifier()
        assert zoo.entry(name).generator


def test_unknown_name_brings_the_nearest(zoo_folder):
    with pytest.raises(ValueError, match=r"got 'sagan_32_tyni'; did you mean 'sagan_32_tiny'"):
        zoo.entry("sagan_32_tyni")
    with pytest.raises(
        ValueError, match="got 'xyz'; the zoo has sagan_32_bars, sagan_32_dots, sagan_32_tiny"
    ):
        zoo.entry("xyz")
    with pytest.raises(ValueError, match=r"got '\.\./zoo/sagan_32_tiny'"):
        zoo.entry("../zoo/sagan_32_tiny")


@pytest.mark.parametrize(
    ("text", "message"),
    [("[generator", "must be TOML"), ("[generators]\n", "got 'generators'"), ("train = 3", "got 'train'")],
)
def test_a_file_that_is_no_entry_is_named(zoo_folder, text, message):
    (zoo_folder / "sagan_32_bad.toml").write_text(text)
    with pytest.raises(ValueError, match=rf"sagan_32_bad\.toml.*{message}"):
        zoo.entry("sagan_32_bad")


def test_create_model_makes_a_fresh_network_of_the_entry(zoo_folder):
    generator = create_model("sagan_32_dots", image_channels=1)
    assert isinstance(generator, Generator)
    assert generator.training
    assert (generator.z_dim, generator.config["image_channels"]) == (5, 1)
    assert isinstance(create_model("sagan_32_dots", part="discriminator"), Discriminator)


@pytest.mark.parametrize("part", ["generator", "discriminator"])
def test_create_model_loads_the_weights(zoo_folder, part):
    first, second = (create_model("sagan_32_tiny", pretrained=True, part=part, num_classes=3) for _ in "12")
    assert not first.training
    assert first.class_names == ["a", "b", "c"]
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key])


def test_a_zoo_name_wins_over_a_folder_of_that_name(zoo_folder, tmp_path, monkeypatch):
    (tmp_path / "here" / "sagan_32_tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert Generator.from_pretrained("sagan_32_tiny").z_dim == 5
    with pytest.raises(FileNotFoundError, match=r"config\.json: must be there"):
        Generator.from_pretrained("./sagan_32_tiny")


def test_an_installed_package_has_the_zoo_inside(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "__file__", str(tmp_path / "sagan_kernels" / "zoo.py"))
    (tmp_path / "zoo").mkdir()
    assert zoo.zoo_folder() == tmp_path / "zoo"
    (tmp_path / "sagan_kernels" / "_zoo").mkdir(
        parents=True
    )  # then a foreign zoo/ beside the package is not it
    assert zoo.zoo_folder() == tmp_path / "sagan_kernels" / "_zoo"


def test_weights_that_are_not_there_name_those_that_are(zoo_folder):
    with pytest.raises(ValueError, match=r"are there for sagan_32_tiny, got 'sagan_32_dots'"):
        create_model("sagan_32_dots", pretrained=True)


def test_overrides_are_checked(zoo_folder):
    with pytest.raises(TypeError, match=r"arguments of Generator, got 'zdim'; did you mean 'z_dim'\?"):
        create_model("sagan_32_dots", zdim=3)
    with pytest.raises(ValueError, match=r"z_dim must be 5 with sagan_32_tiny's weights, got 6"):
        create_model("sagan_32_tiny", pretrained=True, z_dim=6)
    with pytest.raises(ValueError, match="part must be one of generator, discriminator, got 'critic'"):
        create_model("sagan_32_tiny", part="critic")
