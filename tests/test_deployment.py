"""Exported files against the networks they were made from, read by other libraries."""

import copy
import json
import sys

import pytest
import torch
from click.testing import CliRunner

from sagan_kernels import deployment
from sagan_kernels.cli import cli
from sagan_kernels.models import Discriminator, Generator

NETWORKS = {
    "generator": lambda: Generator(32, 3, z_dim=5, base_channels=4, attention_at=[16]),
    "unconditional": lambda: Generator(32, 0, z_dim=5, base_channels=4, attention_at=[16], image_channels=1),
    "baseline": lambda: Generator(32, 3, z_dim=5, base_channels=4, residual=False, spectral_norm=False),
    "critic": lambda: Discriminator(32, 3, base_channels=4, attention_at=[16]),
}
# of the exporters' own code
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def network(name):
    torch.manual_seed(0)
    model = NETWORKS[name]()
    for key, parameter in model.named_parameters():
        if key.endswith("gamma"):
            torch.nn.init.constant_(parameter, 0.7)  # else attention is the identity
    return model


def inputs(model, count):
    torch.manual_seed(count)
    first = torch.randn(count, 5) if isinstance(model, Generator) else torch.rand(count, 3, 32, 32)
    return [first] + ([torch.randint(3, (count,))] if model.num_classes else [])


@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_files_compute_the_network_at_any_batch(name, tmp_path):
    import onnx
    import onnxruntime

    model = network(name)
    state = copy.deepcopy(model.state_dict())
    assert deployment.export_onnx(model, tmp_path / "model.onnx") < 1e-4
    assert model.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 4):
        given = inputs(model, count)
        names = [entry.name for entry in session.get_inputs()]
        (found,) = session.run(None, {key: t.numpy() for key, t in zip(names, given, strict=True)})
        with torch.no_grad():
            expected = copy.deepcopy(model).eval()(*given)
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-4)
    first = "x" if name == "critic" else "z"
    assert names == [first] + ["label"] * (name != "unconditional")
    assert session.get_inputs()[0].shape[0] == "batch"
    stored = onnx.load(tmp_path / "model.onnx")
    assert {node.domain for node in stored.graph.node} <= {"", "ai.onnx"}
    config = {entry.key: entry.value for entry in stored.metadata_props}["sagan_kernels.config"]
    assert json.loads(config) == json.loads(json.dumps(model.config))


@pytest.mark.parametrize("name", NETWORKS)
def test_programs_compute_the_network_without_this_package(name, tmp_path):
    model = network(name)
    assert deployment.export_program(model, tmp_path / "model.pt2") < 1e-4
    with (tmp_path / "model.pt2").open("rb") as file:
        program = torch.export.load(file)
    given = inputs(model, 4)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(*given), copy.deepcopy(model).eval()(*given))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [target for target in targets if "sagan_kernels" in target]


def test_a_difference_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(deployment, "TOLERANCE", -1.0)
    for write in deployment.FORMATS.values():
        with pytest.raises(
            ValueError, match=r"must give the same outputs to -1, got a difference of .*; nothing"
        ):
            write(network("generator"), tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_commands_export_and_refuse(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network("generator").save_pretrained("model")
    done = CliRunner().invoke(cli, ["export", "model", "--out", "model.pt2"])
    assert (done.exit_code, done.output.startswith("model.pt2: ")) == (0, True), done.output
    refused = CliRunner().invoke(cli, ["export", "model", "--out", "model.pth"])
    assert refused.exit_code == 2
    assert "--out: must end in .onnx or .pt2, got 'model.pth'" in refused.output
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r'got no onnxruntime; pip install "sagan-kernels\[onnx\]"'):
        deployment.export_onnx(network("generator"), "model.onnx")
