"""What a conversion refuses, and that it runs nothing of a checkpoint."""

import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hosts import biggan_pytorch, mimicry, studiogan, voletiv
from hosts.formulas import lived_in

from sagan_kernels import Discriminator, Generator, convert_checkpoint
from sagan_kernels.cli import cli


def tensors(host=studiogan, part="Generator", **settings):
    return dict(getattr(host, part)(**settings).state_dict())


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("where", ["value", "beside", "legacy", "plain"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not(tmp_path, where):
    path, mark = tmp_path / "G.pth", tmp_path / "exploded"
    content = {"value": {"state_dict": Bomb(mark)}}.get(where, {"state_dict": tensors(), "extra": Bomb(mark)})
    if where == "plain":
        path.write_bytes(pickle.dumps(content["extra"]))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=where != "legacy")
    need = r"Unsupported operand \d+" if where == "plain" else r"a need of \w+\.mkdir"
    with pytest.raises(
        ValueError, match=rf"G\.pth: must hold tensors and plain values only, got {need}; refused"
    ):
        convert_checkpoint(path)
    assert not mark.exists()


def test_arrays_of_objects_are_refused_and_not_unpickled(tmp_path):
    path, mark = tmp_path / "v.npz", tmp_path / "exploded"
    np.savez(path, a=np.array([Bomb(mark)], dtype=object))
    with pytest.raises(ValueError, match=r"v\.npz: must"):
        convert_checkpoint(path)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["G.pth", "G.safetensors", "G.npz", "G.pt"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"\x80\x02}q\x00.", b"hello"])
def test_damaged_files_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: must "):
        convert_checkpoint(tmp_path / name)


def test_a_truncated_checkpoint_is_named(tmp_path):
    path = tmp_path / "G.pth"
    torch.save(tensors(), path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"G\.pth: must be a whole \.pth file, got "):
        convert_checkpoint(path)


def test_a_scripted_module_is_refused(tmp_path):
    path = tmp_path / "G.pt"
    with zipfile.ZipFile(path, "w") as archive:  # what torch.jit.save writes, in outline
        archive.writestr("G/data.pkl", pickle.dumps({}))
        archive.writestr("G/constants.pkl", pickle.dumps(()))
        archive.writestr("G/code/__torch__.py", "")
        archive.writestr("G/version", "3")
    with pytest.raises(ValueError, match=r"G\.pt: must "):
        convert_checkpoint(path)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("missing.pth", FileNotFoundError, r"missing\.pth: must be there, got no such file"),
        ("model.ckpt.index", FileNotFoundError, "must be there"),
        (3, TypeError, "convert_checkpoint: must be a mapping of names to tensors, got int"),
        ({}, ValueError, "must hold the tensors of a network by name, got nothing"),
        ({"epoch": 3, "lr": 0.1}, ValueError, "must hold the tensors of a network by name, got epoch, lr"),
        ({"a": torch.zeros(1, device="meta")}, ValueError, "must hold values, got a on the meta device"),
        (
            {"layer1.0.conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)},
            ValueError,
            r"must be a SAGAN of biggan_pytorch, .*, got tensors such as layer1\.0\.conv1\.weight, fc\.bias",
        ),
    ],
)
def test_what_is_no_checkpoint_is_named(given, error, message):
    with pytest.raises(error, match=message):
        convert_checkpoint(given)


def test_a_folder_and_a_foreign_ending_are_named(tmp_path):
    (tmp_path / "G.pth").touch()
    (tmp_path / "weights.h5").touch()
    with pytest.raises(ValueError, match=r"must be a file, got a folder of G\.pth; give one of its files"):
        convert_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"weights\.h5: must end in \.safetensors, .*, got \.h5"):
        convert_checkpoint(tmp_path / "weights.h5")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "mimicri"}, "source must be one of .*, got 'mimicri'; did you mean 'mimicry'?"),
        ({"target": "studio"}, "target must be one of .*, got 'studio'; did you mean 'studiogan'?"),
        (
            {"source": "mimicry"},
            r"must be a SAGAN of mimicry, got tensors such as .*; they look like studiogan's",
        ),
        (
            {"settings": {"sn_eps": 1}},
            "settings must be among norm_eps, shortcut_relu, upsample, got 'sn_eps'",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tensors(), **arguments)


def altered(change, **arguments):
    state = tensors(**arguments)
    change(state)
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            lambda: altered(lambda s: s.pop("blocks.1.0.conv2d1.bias")),
            r"studiogan's generator: must have what makes our blocks\.1\.conv1\.bias \(16,\), got nothing",
        ),
        (
            lambda: altered(lambda s: s.pop("blocks.0.0.conv2d2.weight_v")),
            r"must have blocks\.0\.0\.conv2d2\.weight_v, got \d+ tensors without it",
        ),
        (
            lambda: altered(lambda s: s.update({"info_mix_linear.bias": torch.zeros(3)})),
            r"must hold only what our network has a place for, got info_mix_linear\.bias \(3,\)",
        ),
        (
            lambda: altered(lambda s: s.update({"blocks.1.0.bn1.gain.weight_orig": torch.zeros(16, 5)})),
            r"blocks\.1\.0\.bn1\.gain\.weight_orig must make our blocks\.1\.norm1\.parametrizations\.gain\.original "
            r"\(3, 16\), got \(16, 5\); its other sizes say 32 px, 3 classes",
        ),
        (
            lambda: altered(lambda s: s.update({"blocks.0.0.conv2d2.weight_orig": torch.zeros(16)})),
            r"blocks\.0\.0\.conv2d2\.weight_orig must have 4 dimensions, none empty, got \(16,\)",
        ),
        (
            lambda: altered(lambda s: s.update({"conv2d5.weight_u": torch.zeros(4)})),
            r"conv2d5\.weight_u must have as many numbers as conv2d5\.weight_orig has outputs, 3, got 4",
        ),
        (
            lambda: altered(lambda s: s.update({"blocks.2.0.sigma": torch.zeros(16)})),
            r"blocks\.2\.0\.sigma must make our attention\.16\.gamma \(\), got \(16,\)",
        ),
        (
            lambda: altered(lambda s: s.update({"linear0.weight_orig": torch.zeros(36 * 16, 6)})),
            "must start from a 4×4 map of 16 channels, 256 numbers, got 576",
        ),
        (
            lambda: {k: v for k, v in tensors().items() if not k.startswith(("blocks.2.", "blocks.3."))},
            "must have 3, 4, 5, 6 blocks for 32, 64, 128, 256 px, got 2",
        ),
        (
            lambda: altered(lambda s: s.update(w=s.pop("linear0.weight_orig"))),
            r"must have linear0\.weight_orig, got \d+ tensors without it",
        ),
        (
            lambda: (
                tensors(biggan_pytorch, "Discriminator", attention=(16, 8, 4))
                | {
                    k.replace("blocks.1.1", "blocks.2.1"): v
                    for k, v in tensors(biggan_pytorch, "Discriminator", attention=(8,)).items()
                }
            ),
            r"blocks\.2\.1 must follow the first block that makes its side, 8 px, got block 3; ours attends once",
        ),
        (
            lambda: (
                {
                    k.replace("_orig", ""): v
                    for k, v in tensors().items()
                    if not k.startswith("conv2d5.weight_")
                }
                | {"conv2d5.weight": torch.zeros(3, 16, 3, 3)}
            ),
            "ours divides all weights by their spectral norm, or none",
        ),
    ],
)
def test_the_first_difference_is_named(state, message):
    state = state()
    if "conv2d5.weight" in state:  # one plain layer among normed ones
        state = tensors() | {"conv2d5.weight": state["conv2d5.weight"]}
        for name in ("orig", "u", "v"):
            del state[f"conv2d5.weight_{name}"]
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(state)


def test_heykeetae_is_recognized_and_refused_with_the_reason():
    generator = {"l1.0.module.weight_bar": torch.zeros(6, 16, 4, 4), "l1.1.running_mean": torch.zeros(16)}
    with pytest.raises(ValueError, match=r"heykeetae's generator: .* attn1 attends without pooling"):
        convert_checkpoint(generator)
    with pytest.raises(ValueError, match=r"heykeetae's discriminator: .* leaky ReLU of slope 0\.1"):
        convert_checkpoint({"l1.0.module.weight_bar": torch.zeros(8, 3, 4, 4)})
    with pytest.raises(
        ValueError, match="a generator for heykeetae: must be one that its code can hold, but there"
    ):
        convert_checkpoint(Generator(32, 3, base_channels=4), target="heykeetae")


@pytest.mark.parametrize(
    ("network", "target", "message"),
    [
        (Generator, "studiogan", r"a generator for studiogan: must have norm_eps 0\.0001, got 1e-05"),
        (Generator, "mimicry", "must have upsample 'bilinear', got 'nearest'"),
        (
            Discriminator,
            "studiogan",
            "a discriminator for studiogan: must have shortcut_relu True, got False",
        ),
        (Generator, "voletiv", "must have attention_bias True, got False"),
        ({"num_classes": 0}, "biggan_pytorch", "must have classes, got num_classes 0"),
        ({"residual": False}, "biggan_pytorch", "must have residual True, got False"),
        ({"norm_spectral_norm": True}, "biggan_pytorch", "must have norm_spectral_norm False, got True"),
        ({}, "official", r"must have attention_at one of \[\] at 32 px, got \[16\]"),
    ],
)
def test_what_a_host_cannot_hold_is_named(network, target, message):
    settings = network if isinstance(network, dict) else {}
    cls = Generator if isinstance(network, dict) else network
    model = cls(**{"resolution": 32, "num_classes": 3, "base_channels": 4} | settings)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(model, target=target)


def test_our_own_state_dict_without_its_settings_is_refused():
    with pytest.raises(ValueError, match="our own networks are given as a model or a model folder"):
        convert_checkpoint(Generator(32, 3, base_channels=4).state_dict())


def test_a_conversion_knows_its_networks():
    conversion = convert_checkpoint(tensors())
    with pytest.raises(ValueError, match="network must be one of generator, got 'discriminator'"):
        conversion.model("discriminator")
    back = convert_checkpoint(conversion, target="studiogan")
    with pytest.raises(ValueError, match="target must be sagan_kernels, got studiogan"):
        back.model()
    with pytest.raises(ValueError, match="must be one to sagan_kernels, got studiogan"):
        convert_checkpoint(back, target="mimicry")


def test_two_networks_of_a_kind_are_refused():
    with pytest.raises(ValueError, match="must hold one generator, got two; give one state dict"):
        convert_checkpoint({"first": tensors(), "second": tensors()})


def test_attention_of_a_fixed_name_must_stand_where_its_channels_say():
    state = tensors(voletiv, "Discriminator")
    for key in [key for key in state if key.startswith("self_attn.snconv1x1_theta.weight")]:
        state[key] = (
            torch.zeros(4, 32, 1, 1) if key.endswith("orig") else torch.zeros(4 if key[-1] == "u" else 32)
        )
    with pytest.raises(
        ValueError, match=r"self_attn must stand where it does in the code, at \[32\] px, got 32 channels"
    ):
        convert_checkpoint(state)


def test_command_converts_there_and_back(tmp_path):
    z, label = torch.randn(2, 6, dtype=torch.float64), torch.tensor([0, 2])
    network = lived_in(mimicry.Generator(), z, label).float()
    path = tmp_path / "netG_9_steps.pth"
    torch.save({"model_state_dict": network.state_dict(), "optimizer_state_dict": {}, "global_step": 9}, path)
    run = CliRunner().invoke
    done = run(cli, ["convert", str(path), "--from", "mimicry", "--out", str(tmp_path / "ours")])
    assert done.exit_code == 0, done.output
    assert "generator of mimicry, for sagan_kernels:" in done.output
    loaded = Generator.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(loaded(z.float(), label), network(z.float(), label), rtol=1e-4, atol=1e-5)
    done = run(cli, ["convert", str(tmp_path / "ours"), "--to", "mimicry", "--out", str(tmp_path / "back")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "back" / "generator.safetensors").is_file()
    again = convert_checkpoint(tmp_path / "back" / "generator.safetensors").model()
    torch.testing.assert_close(again(z.float(), label), loaded(z.float(), label))


def test_command_ends_with_one_line_and_code_2_on_wrong_input(tmp_path):
    path = tmp_path / "G.pth"
    torch.save(tensors(), path)
    for arguments in (["gone.pth"], [str(path), "--from", "mimicry"], [str(path), "--to", "nowhere"]):
        done = CliRunner().invoke(cli, ["convert", *arguments, "--out", str(tmp_path / "out")])
        assert done.exit_code == 2, done.output
        assert len(done.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "out").exists()


def test_options_say_what_the_tensors_do_not(tmp_path):
    path = tmp_path / "G.pth"
    torch.save(tensors(), path)
    done = CliRunner().invoke(
        cli, ["convert", str(path), "--norm-eps", "1e-3", "--out", str(tmp_path / "out")]
    )
    assert done.exit_code == 0, done.output
    assert Generator.from_pretrained(tmp_path / "out").config["norm_eps"] == 1e-3


@pytest.mark.parametrize(
    ("host", "part"), [(biggan_pytorch, "Generator"), (studiogan, "Generator"), (voletiv, "Discriminator")]
)
def test_any_tensor_of_a_wrong_shape_is_an_error_of_one_line(host, part):
    state = tensors(host, part)
    for i, key in enumerate(state):
        wrong = torch.zeros([(), (0,), (7,), (2, 3), (5, 5, 3, 3, 1)][i % 5])
        if wrong.shape == state[key].shape or key.startswith("block5.snconv2d0.") or key.endswith("sv0"):
            continue  # the last two are not read
        with pytest.raises(ValueError, match=r"^convert_checkpoint: [^\n]+$"):
            convert_checkpoint(state | {key: wrong})
