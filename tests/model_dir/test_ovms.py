"""Repositories of OpenVINO Model Server, read by the schema that the server uses; the server itself is not run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ov_afm.cli.export import main as export_main
from ov_afm.errors import ConfigError
from ov_afm.model_dir import ovms
from ov_afm.model_dir.inference import EXACT

STRING, BOOL, UINT64, MESSAGE, REPEATED, OPTIONAL = 9, 8, 4, 11, 3, 1


def schema() -> Any:
    """MediaPipe's and Model Server's messages, as far as a graph of ours uses them; names and types are upstream's."""
    descriptor_pb2 = pytest.importorskip("google.protobuf.descriptor_pb2")
    from google.protobuf import any_pb2, descriptor_pool, message_factory

    def message(name: str, *fields: tuple[str, int, int, int] | tuple[str, int, int, int, str]) -> None:
        made = proto.message_type.add(name=name)
        for title, number, kind, label, *target in fields:
            field = made.field.add(name=title, number=number, type=kind, label=label)
            if target:
                field.type_name = f".{target[0]}"

    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(any_pb2.DESCRIPTOR.serialized_pb)
    proto = descriptor_pb2.FileDescriptorProto(name="graph.proto", package="mediapipe", syntax="proto2")
    proto.dependency.append("google/protobuf/any.proto")
    message("LLMCalculatorOptions", ("models_path", 1, STRING, 2), ("cache_size", 3, UINT64, OPTIONAL),
            ("device", 6, STRING, OPTIONAL), ("enable_prefix_caching", 10, BOOL, OPTIONAL))  # fmt: skip
    message("SyncSet", ("tag_index", 1, STRING, REPEATED))
    message("SyncSetInputStreamHandlerOptions", ("sync_set", 1, MESSAGE, REPEATED, "mediapipe.SyncSet"))
    message("MediaPipeOptions")
    proto.message_type[-1].extension_range.add(start=20000, end=536870912)
    proto.message_type[2].extension.add(
        name="ext", number=144456535, type=MESSAGE, label=OPTIONAL, extendee=".mediapipe.MediaPipeOptions",
        type_name=".mediapipe.SyncSetInputStreamHandlerOptions")  # fmt: skip
    message("InputStreamInfo", ("tag_index", 1, STRING, OPTIONAL), ("back_edge", 2, BOOL, OPTIONAL))
    message("InputStreamHandlerConfig", ("input_stream_handler", 1, STRING, OPTIONAL),
            ("options", 3, MESSAGE, OPTIONAL, "mediapipe.MediaPipeOptions"))  # fmt: skip
    message("Node", ("name", 1, STRING, OPTIONAL), ("calculator", 2, STRING, OPTIONAL),
            ("input_stream", 3, STRING, REPEATED), ("output_stream", 4, STRING, REPEATED),
            ("input_side_packet", 5, STRING, REPEATED),
            ("node_options", 8, MESSAGE, REPEATED, "google.protobuf.Any"),
            ("input_stream_handler", 11, MESSAGE, OPTIONAL, "mediapipe.InputStreamHandlerConfig"),
            ("input_stream_info", 13, MESSAGE, REPEATED, "mediapipe.InputStreamInfo"))  # fmt: skip
    message("CalculatorGraphConfig", ("node", 1, MESSAGE, REPEATED, "mediapipe.Node"),
            ("input_stream", 10, STRING, REPEATED), ("output_stream", 15, STRING, REPEATED))  # fmt: skip
    pool.Add(proto)
    get = lambda name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"mediapipe.{name}"))  # noqa: E731
    return pool, get("CalculatorGraphConfig"), get("LLMCalculatorOptions")


def read_graph(path: Path) -> tuple[Any, Any]:
    """The graph and its calculator's options."""
    pool, graph_type, options_type = schema()
    from google.protobuf import text_format

    graph = text_format.Parse(path.read_text(), graph_type(), descriptor_pool=pool)
    options = options_type()
    assert graph.node[0].node_options[0].Unpack(options)
    return graph, options


def test_a_repository_holds_the_model_its_graph_and_a_config(tiny_model: Path, tmp_path: Path) -> None:
    served = ovms.add(tiny_model, tmp_path / "repository")
    graph, options = read_graph(served / "graph.pbtxt")
    assert [node.calculator for node in graph.node] == ["HttpLLMCalculator"]
    assert (options.models_path, options.device, options.enable_prefix_caching) == ("./", "CPU", True)
    assert {path.name for path in tiny_model.iterdir() if path.is_file()} | {"graph.pbtxt"} == {
        path.name for path in served.iterdir()
    }
    assert (served / "openvino_model.bin").samefile(tiny_model / "openvino_model.bin")
    config = json.loads((tmp_path / "repository" / "config.json").read_text())
    assert config == {
        "mediapipe_config_list": [{"name": tiny_model.name, "base_path": tiny_model.name}],
        "model_config_list": [],
    }
    assert (tmp_path / "repository" / config["mediapipe_config_list"][0]["base_path"]).is_dir()


def test_the_repositorys_model_answers(tiny_model: Path, tmp_path: Path) -> None:
    import openvino_genai

    served = ovms.add(tiny_model, tmp_path / "repository")
    greedy = {"max_new_tokens": 5, "do_sample": False}
    answers = [
        openvino_genai.LLMPipeline(path, "CPU", **EXACT).generate("x", **greedy) for path in (served, tiny_model)
    ]
    assert answers[0] == answers[1] != ""


def test_an_npu_gets_no_cache_of_a_batch(tiny_model: Path, tmp_path: Path) -> None:
    _, options = read_graph(ovms.add(tiny_model, tmp_path, device="NPU") / "graph.pbtxt")
    assert (options.device, options.HasField("cache_size")) == ("NPU", False)


def test_what_else_is_served_stays_and_again_is_no_change(tiny_model: Path, tmp_path: Path) -> None:
    other = {"name": "other", "base_path": "elsewhere"}
    (tmp_path / "config.json").write_text(json.dumps({"mediapipe_config_list": [other], "monitoring": {"a": 1}}))
    served = ovms.add(tiny_model, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in served.iterdir()}
    ovms.add(tiny_model, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in served.iterdir()} == before
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["mediapipe_config_list"] == [other, {"name": tiny_model.name, "base_path": tiny_model.name}]
    assert config["monitoring"] == {"a": 1}


def test_another_model_of_the_name_is_not_touched(tiny_model: Path, tmp_path: Path) -> None:
    there = tmp_path / tiny_model.name
    there.mkdir()
    (there / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        ovms.add(tiny_model, tmp_path)
    assert [path.name for path in there.iterdir()] == ["mine"]
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"model_config_list": 3}', '{"mediapipe_config_list": ["x"]}', '{"architectures": ["A"]}']
)
def test_another_programs_config_is_refused(tiny_model: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="is no configuration of OpenVINO Model Server; choose another folder"):
        ovms.add(tiny_model, tmp_path)
    assert (tmp_path / "config.json").read_text() == text


def test_another_programs_config_is_refused_before_the_export(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "config.json").write_text("[1]")
    output = tmp_path / "model"
    arguments = [str(tiny_checkpoint), "-o", str(output), "--ovms", str(tmp_path / "repository")]
    assert export_main(arguments) == 1
    assert "is no configuration of OpenVINO Model Server" in capsys.readouterr().err
    assert not output.exists()


def test_export_adds_a_model_that_is_there_already(tiny_model: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = tmp_path / "tiny-int8"
    shutil.copytree(tiny_model, model)
    arguments = [str(tiny_checkpoint), "--recipe", "int8", "--output", str(model), "--ovms", str(tmp_path / "served")]
    assert export_main(arguments) == 0
    assert (tmp_path / "served" / "tiny-int8" / "graph.pbtxt").exists()


def test_repository_that_holds_the_model_itself_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "relu2").mkdir()
    before = sorted(path.name for path in model.iterdir())
    with pytest.raises(ConfigError) as caught:
        ovms.add(model, tmp_path, replace=True)
    assert caught.value.code == "ovms-holds-model"
    assert sorted(path.name for path in model.iterdir()) == before
