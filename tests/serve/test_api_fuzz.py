"""Requests drawn from the server's own OpenAPI description: no 5xx, and only described statuses. pytest -m server"""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from serving import attached, detached
from shadowpeft.data.robot import parse_action
from shadowpeft.serve.cloud_role import CloudRole
from shadowpeft.serve.edge_role import EdgeRole
from shadowpeft.serve.engine import Engine, EngineLimits
from shadowpeft.serve.guard import Keys
from shadowpeft.serve.router import Router
from shadowpeft.serve.server import Settings, build
from webserver import Running

pytestmark = pytest.mark.server

KEY = "the-same-key-for-both"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("role", ["cloud", "edge"])
def test_drawn_requests_are_answered_or_refused_as_described(role):
    limits = EngineLimits(new_tokens=8)
    if role == "cloud":
        made = CloudRole(Engine(attached(), limits), system=None, default_tokens=4)
    else:
        made = EdgeRole(Engine(detached(), limits), Router(parse_action), None, "late", system=None, default_tokens=4)
    with Running(build(made, Settings(Keys((KEY,), (KEY,))))) as server:
        schema = schemathesis.openapi.from_url(server.url + "/openapi.json", headers={"authorization": f"Bearer {KEY}"})
        tried = []
        for found in schema.get_all_operations():
            operation = found.ok()

            @settings(
                max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True
            )
            @given(case=operation.as_strategy())
            def check(case):
                case.call_and_validate(
                    headers={"authorization": f"Bearer {KEY}"},
                    checks=[not_a_server_error, status_code_conformance, response_schema_conformance],
                )

            check()
            tried.append(operation.label)
        assert len(tried) >= 9
