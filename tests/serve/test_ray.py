"""The cloud as two replicas under Ray Serve (marker ``ray``): one address, a killed replica, versions for all, no process left.

Run with: pytest -m ray tests/serve
"""

import importlib.util
import secrets
import tempfile
import threading
import time
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import torch
import yaml
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from chatbase import chat_tokenizer, save_base
from serving import ask, engine_of
from shadowpeft.errors import ConfigError
from tiny import adapter_config, randomise
from webserver import free_port, metric, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

KEY, ADMIN = "user-key-0123456789", "admin-key-0123456789"
EXAMPLE = Path(__file__).parents[2] / "examples" / "ray-serve.yaml"
TOKENS = 6


@pytest.fixture(scope="module", autouse=True)
def _environment():
    """Before Ray is imported: it reads these once."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed; pip install 'shadowpeft[ray]'")
    settings = {
        "SHADOWPEFT_API_KEYS": KEY,
        "SHADOWPEFT_ADMIN_KEYS": ADMIN,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),  # or Ray writes one into the home folder
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base and three adapters: two good versions, and one of another shape."""
    made = tmp_path_factory.mktemp("ray")
    base = save_base(made / "base", max_position_embeddings=512)
    for name, seed, config in (("v1", 1, {}), ("v2", 2, {}), ("wide", 3, {"r": 7})):
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), adapter_config(**config))
        randomise(model, seed=seed)
        model.save_pretrained(made / name)
        chat_tokenizer().save_pretrained(made / name)
    return made


@pytest.fixture(scope="module")
def texts(folder):
    """What each version says, from an engine of its own."""
    from shadowpeft.apps.serve import _cloud_backend

    said = {}
    for version in ("v1", "v2"):
        engine = engine_of(_cloud_backend({"robot": str(folder / version)}, None, torch.device("cpu")))
        said[version] = ask(engine, "sit down", "robot", max_tokens=TOKENS).text
        engine.stop()
    assert said["v1"] != said["v2"]
    return said


@pytest.fixture(scope="module")
def arguments(folder):
    return {"adapters": [f"robot={folder / 'v1'}"], "versions": str(folder), "rows": 4, "queue": 8}


class Cluster:
    """Ray and Serve in this process, on the loopback interface, with what they write in a folder of their own."""

    def __init__(self, arguments):
        self.arguments = arguments
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def deploy(self, versions):
        """The example file with other arguments, handed over as serve run does; it takes effect later."""
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        wanted = yaml.safe_load(EXAMPLE.read_text())
        wanted["http_options"]["port"] = self.port
        (application,) = wanted["applications"]
        application["args"] = self.arguments
        application["deployments"][0].update(user_config={"versions": versions}, ray_actor_options={"num_cpus": 0.5})
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(wanted))

    def wait_for(self, text):
        """Until both replicas are there and say ``text``."""
        said = {}

        def done():
            if self.status() is None or self.status().status != "RUNNING":
                return False
            given, replica = self.ask()
            said[replica] = given
            return [*said.values()].count(text) == 2

        wait_for(done, 240)

    def status(self):
        from ray import serve

        return serve.status().applications.get("cloud")

    def replicas(self):
        """Processes with a replica."""
        return [p for p in family() if "ServeReplica" in " ".join(p.cmdline())]

    def ask(self, **options):
        """Text and replica of one answer."""
        with openai.OpenAI(base_url=self.url + "/v1", api_key=KEY, max_retries=0, timeout=60) as client:
            made = client.completions.with_raw_response.create(
                model="robot", prompt="sit down", max_tokens=TOKENS, **options
            )
            return made.parse().choices[0].text, made.headers["x-shadow-replica"]


def family():
    """All processes that this one started, and theirs."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            process.cmdline()
            found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def cluster(arguments, texts):
    here = Path.cwd()
    before = {p.pid for p in family()}
    import ray
    from ray import serve

    with tempfile.TemporaryDirectory(prefix="ray-") as temporary:  # short: a socket's path has at most 107 characters
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=80 << 20,
            _node_ip_address="127.0.0.1",
            _temp_dir=temporary,
            log_to_driver=False,
        )
        try:
            made = Cluster(arguments)
            serve.start(http_options={"host": "127.0.0.1", "port": made.port})
            made.deploy({})
            made.wait_for(texts["v1"])
            yield made
        finally:
            serve.shutdown()
            ray.shutdown()
        wait_for(lambda: {p.pid for p in family()} <= before, 60)
    assert Path.cwd() == here


def test_the_example_is_a_deployment():
    from ray.serve.schema import ServeDeploySchema

    from shadowpeft.apps import ray_serve

    (wanted,) = ServeDeploySchema.model_validate(yaml.safe_load(EXAMPLE.read_text())).applications
    module, _, name = wanted.import_path.partition(":")
    assert module == ray_serve.__name__
    made = getattr(ray_serve, name)(wanted.args)._bound_deployment
    assert [d.name for d in wanted.deployments] == [made.name]
    assert made.max_ongoing_requests > 16 + 64
    assert ray_serve.Wanted.model_validate(wanted.deployments[0].user_config).versions == {}


def test_wrong_arguments_are_refused():
    from shadowpeft.apps import ray_serve

    assert ray_serve.app({"adapters": "a=x,b=y", "rows": "3"})._bound_deployment.init_args[0]["adapters"] == [
        "a=x",
        "b=y",
    ]
    with pytest.raises(ConfigError, match=r"args has 'row': .* it may hold adapters, base"):
        ray_serve.app({"adapters": ["a=x"], "row": 3})
    with pytest.raises(ConfigError, match="args has 'rows'"):
        ray_serve.app({"adapters": ["a=x"], "rows": 0})


def test_the_address_is_on_the_loopback_interface_and_ray_itself_asks_for_a_token(cluster):
    ours = {
        c.laddr.ip
        for p in family()
        for c in p.net_connections("inet")
        if c.status == psutil.CONN_LISTEN and c.laddr.port == cluster.port
    }
    assert ours == {"127.0.0.1"}
    from ray._raylet import AuthenticationMode, get_authentication_mode

    assert get_authentication_mode() == AuthenticationMode.TOKEN  # Ray's own ports cannot be kept to one interface


def test_both_replicas_answer_behind_one_address(cluster, texts):
    found = [cluster.ask() for _ in range(4)]
    deadline = time.monotonic() + 60
    while len({replica for _, replica in found}) < 2:
        assert time.monotonic() < deadline, "one replica answers everything"
        found.append(cluster.ask())
    assert {text for text, _ in found} == {texts["v1"]}


def test_streams_pass_through(cluster, texts):
    with openai.OpenAI(base_url=cluster.url + "/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        parts = list(client.completions.create(model="robot", prompt="sit down", max_tokens=TOKENS, stream=True))
    assert "".join(part.choices[0].text for part in parts) == texts["v1"]
    assert len(parts) > 2


def test_keys_health_and_metrics(cluster):
    with (
        openai.OpenAI(base_url=cluster.url + "/v1", api_key="wrong-key-0123456789", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()
    with httpx.Client(base_url=cluster.url, trust_env=False, timeout=60) as http:
        assert http.get("/readyz").json()["status"] == "ready"
        assert http.get("/metrics").status_code == 401
        _, replica = cluster.ask()
        seen = {}
        while replica not in seen:
            text = http.get("/metrics", headers={"authorization": f"Bearer {KEY}"}).text
            for name in {
                line.partition('replica="')[2].partition('"')[0] for line in text.splitlines() if 'replica="' in line
            }:
                seen[name] = metric(text, "shadowpeft_answer_seconds_count", where="cloud", replica=name)
        assert seen[replica] >= 1


def test_the_admin_routes_say_who_changes_adapters(cluster):
    with httpx.Client(base_url=cluster.url, trust_env=False, headers={"authorization": f"Bearer {ADMIN}"}) as http:
        refused = http.post("/admin/adapters/robot/swap", json={"version": "v2"})
        assert refused.status_code == 409
        assert "user_config" in refused.json()["error"]["message"]


def test_a_version_reaches_every_replica_and_goes_back_without_a_lost_request(cluster, texts):
    found, failed, over = [], [], threading.Event()

    def send():
        while not over.is_set():
            try:
                found.append(cluster.ask())
            except openai.OpenAIError as error:
                failed.append(error)

    processes = {p.pid for p in cluster.replicas()}
    clients = [threading.Thread(target=send) for _ in range(2)]
    [c.start() for c in clients]
    try:
        for versions, expected in (({"robot": "v2"}, "v2"), ({}, "v1")):
            cluster.deploy(versions)
            cluster.wait_for(texts[expected])
    finally:
        over.set()
        [c.join() for c in clients]
    assert failed == []
    assert {text for text, _ in found} <= set(texts.values())
    assert {p.pid for p in cluster.replicas()} == processes  # changed in place, not started anew


def test_a_version_that_does_not_fit_fails_the_deployment_and_others_go_on(cluster, texts):
    cluster.deploy({"robot": "wide"})
    wait_for(lambda: cluster.status().deployments["Cloud"].status in ("UNHEALTHY", "DEPLOY_FAILED"), 240)
    assert "r = " in cluster.status().deployments["Cloud"].message
    assert cluster.ask()[0] == texts["v1"]
    cluster.deploy({})
    cluster.wait_for(texts["v1"])


def test_requests_go_on_when_a_replica_is_killed(cluster, texts):
    victim, *others = cluster.replicas()
    assert others
    victim.kill()
    failed = 0
    for _ in range(20):
        try:
            assert cluster.ask()[0] == texts["v1"]
        except openai.APIStatusError:
            failed += 1  # what was on its way to it
    assert failed <= 1
    wait_for(lambda: len([p for p in cluster.replicas() if p.pid != victim.pid]) == 2, 240)
    wait_for(lambda: cluster.status().status == "RUNNING", 240)
    assert cluster.ask()[0] == texts["v1"]
