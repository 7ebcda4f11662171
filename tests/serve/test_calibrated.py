"""A calibration belongs to one edge model and one system message: another of either is refused or told."""

import copy
import dataclasses
import logging

import httpx
import pytest
import torch

import edges
from commands import call
from serving import CALIBRATION
from shadowpeft.apps import serve
from shadowpeft.errors import ConfigError
from shadowpeft.export import quantize, vocab
from shadowpeft.hf.base.fingerprint import SAME
from shadowpeft.serve.backend import Detached
from shadowpeft.serve.calibrated import Calibrated, distance, sketch
from shadowpeft.serve.edge_role import EdgeRole
from shadowpeft.serve.engine import Engine, EngineLimits
from shadowpeft.serve.guard import Keys
from shadowpeft.serve.options import Options
from shadowpeft.serve.router import FILE, Calibration, Router
from shadowpeft.serve.server import Settings, build
from webserver import Running, metric


@pytest.fixture(scope="module")
def model():
    return edges.model()


def trained(model, seed):
    """The model after a short training run from its weights."""
    made = copy.deepcopy(model).train()
    optimiser = torch.optim.AdamW(made.parameters(), lr=1e-3)
    torch.manual_seed(seed)
    for _ in range(30):
        ids = torch.randint(3, 420, (4, 12))
        made(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return made.eval()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_the_same_model(model, dtype):
    """A value of bfloat16 is off by 2^-8 of itself at most, and so is what is made of such values."""
    gap = distance(sketch(model), sketch(copy.deepcopy(model).to(dtype)))
    assert 0 < gap <= 2**-8 < SAME / 5


def test_eight_bits_and_fewer_tokens_are_the_same_model(model, tmp_path):
    quantize.write(model, edges.tokenizer(), tmp_path / "q", "int8")
    assert 0 < distance(sketch(model), sketch(quantize.read(tmp_path / "q"))) < SAME
    fewer = vocab.trim(model, edges.tokenizer(), range(300)).model
    assert fewer.config.vocab_size < model.config.vocab_size
    assert distance(sketch(model), sketch(fewer)) == 0


def test_another_training_run_is_another_model(model):
    one, other = trained(model, 1), trained(model, 2)
    assert distance(sketch(one), sketch(copy.deepcopy(one).half())) < SAME
    for pair in ((model, one), (one, other), (one, trained(one, 3))):
        assert distance(*map(sketch, pair)) > SAME
    assert distance(sketch(model), sketch(edges.model(num_hidden_layers=3))) == float("inf")
    assert distance(sketch(model), sketch(edges.model("qwen3"))) == float("inf")


def calibration_of(model, **more):
    return dataclasses.replace(CALIBRATION, report={"model": sketch(model), **more})


def test_a_swap_to_another_model_is_told_and_the_way_back_too(model, tmp_path, caplog):
    for name, made in (("one", model), ("half", copy.deepcopy(model).half()), ("two", trained(model, 2))):
        made.save_pretrained(tmp_path / name)
        edges.tokenizer().save_pretrained(tmp_path / name)
    backend = Detached(copy.deepcopy(model), edges.tokenizer(), "m", str(tmp_path / "one"))
    router = Router(lambda text: None, calibration_of(model))
    role = EdgeRole(Engine(backend, EngineLimits()), router, None, "x", system=None, default_tokens=4)
    settings = Settings(Keys(None, ("admin-key-0123456789",)), versions=tmp_path)
    headers = {"authorization": "Bearer admin-key-0123456789"}
    with Running(build(role, settings)) as edge, httpx.Client(base_url=edge.url, headers=headers) as http:

        def told():
            gauge = metric(http.get("/metrics").text, "shadowpeft_calibration_of_another_model")
            problem = http.get("/readyz").json().get("model_problem")
            assert gauge == (problem is not None)
            return problem

        def change(action, **body):
            answer = http.post(f"/admin/adapters/m/{action}", json=body or None)
            assert answer.status_code == 200, answer.text

        assert told() is None
        assert "calibration_of_another_model" in http.get("/metrics").text
        change("swap", version="half")
        assert told() is None
        assert "not the one that the calibration was made for" not in caplog.text
        change("swap", version="two")
        assert "calibrate again with this model, or serve the other" in told()
        assert [r.levelname for r in caplog.records if "its weights differ by" in r.message] == ["WARNING"]
        change("rollback")
        assert told() is None


def test_a_model_that_was_not_calibrated_is_told_at_the_start(model, caplog):
    backend = Detached(trained(model, 4), edges.tokenizer(), "m")
    with caplog.at_level(logging.WARNING, "shadowpeft.serve"):
        found = Calibrated.of(calibration_of(model), backend)
    assert found.problem in caplog.text
    assert "the edge model is not the one" in found.problem
    assert Calibrated.of(None, backend) is Calibrated.of(CALIBRATION, backend) is None
    good = sketch(model)
    for bad in (3, {}, {**good, "values": {}}, {**good, "values": {"0.a": ["x"]}}, {**good, "layers": None}):
        with pytest.raises(ConfigError, match="'model' in its report that is damaged; calibrate again"):
            Calibrated.of(dataclasses.replace(CALIBRATION, report={"model": bad}), backend)


@pytest.mark.parametrize(
    ("made", "given", "message"),
    [
        ("Be a dog.", None, "made with the system message 'Be a dog.' but --system is not given; pass --system 'Be a dog.'"),
        ("Be a dog.", "Be a cat.", "but --system is 'Be a cat.'; pass --system 'Be a dog.', or calibrate again"),
        (None, "Be a cat.", "made with no system message but --system is 'Be a cat.'; pass --system '', or calibrate"),
    ],
)
def test_another_system_message_is_refused_at_the_start(monkeypatch, capsys, tmp_path, made, given, message):
    dataclasses.replace(CALIBRATION, report={"system": made}).save(tmp_path / FILE)
    more = () if given is None else ("--system", given)
    code, _, err = call(monkeypatch, capsys, "serve", tmp_path, "--role", "edge", "--no-auth", *more)
    assert code == 2
    assert message in " ".join(err.split())


@pytest.mark.parametrize(("report", "given"), [({"system": "Be a dog."}, "Be a dog."), ({"system": None}, None), ({}, "x")])
def test_the_same_system_message_and_calibrations_that_do_not_say_are_served(tmp_path, report, given):
    dataclasses.replace(CALIBRATION, report=report).save(tmp_path / FILE)
    router, *_ = serve._router(Options(adapters=[str(tmp_path)], role="edge", system=given), None)
    assert router.calibration == Calibration.load(tmp_path / FILE)


@pytest.mark.parametrize("threshold", [2.0, 0.5])
@pytest.mark.parametrize("cloud", ["http://cloud:8000", None])
def test_a_calibration_that_keeps_nothing_is_told_at_the_start(tmp_path, caplog, threshold, cloud):
    dataclasses.replace(CALIBRATION, threshold=threshold).save(tmp_path / FILE)
    with caplog.at_level(logging.WARNING, "shadowpeft.serve"):
        serve._router(Options(adapters=[str(tmp_path)], role="edge", cloud_url=cloud), None)
    told = [r.getMessage() for r in caplog.records if "keeps nothing on the device" in r.getMessage()]
    assert len(told) == (threshold > 1)
    follows = "every answer is marked degraded: there is no cloud" if cloud is None else "every request goes to the cloud"
    assert all(f"'{tmp_path / FILE}'" in each and follows in each and "calibrate again" in each for each in told)
