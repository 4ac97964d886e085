"""What other budgets and numbers of devices would take."""

from __future__ import annotations

import pytest

from oocattn import Plan, plan_ahead
from oocattn.cli.main import main
from oocattn.planning.ahead import estimated_scratch
from oocattn.planning.what_if import BUDGETS, Alternative, table, what_if


def alternatives(plan: Plan) -> list[Alternative]:
    return what_if(plan, estimated_scratch(plan.device))


def of_h100(host_memory: str, devices: int = 1) -> Plan:
    shape = {"tokens": "4M", "heads": 8, "head_dim": 64, "dtype": "float16", "causal": True}
    return plan_ahead(**shape, device="h100", devices=devices, host_memory=host_memory, checkpoint_interval=0)


def test_larger_budgets_read_less_and_take_less_time() -> None:
    plan = of_h100("2GiB")
    found = alternatives(plan)
    assert [each.devices for each in found[:: len(BUDGETS)]] == [1, 2, 4, 8]
    assert found[BUDGETS.index(1)].plan is plan
    of_one = [each.plan for each in found[: len(BUDGETS)] if each.plan is not None]
    assert of_one[0].link("read").amount > 2 * of_one[-1].link("read").amount
    assert of_one[0].seconds > of_one[-1].seconds
    assert all(each.plan.peak_host <= each.host_memory for each in found if each.plan)


def test_another_number_of_devices_is_as_if_it_was_asked_for() -> None:
    found = {each.devices: each.plan for each in alternatives(of_h100("8GiB")) if each.host_memory == 8 << 30}
    asked = of_h100("8GiB", devices=4)
    assert found[4] is not None
    assert (found[4].seconds, found[4].digest) == (asked.seconds, asked.digest)


def test_budgets_without_a_plan_are_said_to_be_too_small() -> None:
    shown = table(alternatives(of_h100("160MiB")))
    assert "     40 MiB        8   too small for any plan" in shown
    assert "    640 MiB        1 " in shown


def test_the_command_prints_the_table_below_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--tokens", "64K", "--heads", "2", "--head-dim", "64", "--dtype", "float32"]
    assert main(["plan", *shape, "--device", "cpu", "--devices", "2", "--budgets"]) == 0
    plan, shown = capsys.readouterr().out.split("\n\n host memory  devices")
    assert plan.startswith("problem")
    assert len(shown.strip().splitlines()) == 1 + len(BUDGETS)
    assert shown.count("compute") == len(BUDGETS)
