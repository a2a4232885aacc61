"""Health, models and metrics: what they say of the fleet."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from interlock.core.targets import State


async def health(world) -> tuple[int, str]:
    answer = await world.ask("GET", "/health")
    return answer.status, answer.json["status"]


async def test_health_is_200_only_where_a_request_is_served_or_waits_on_purpose(world, fleet_view) -> None:
    assert await health(world) == (200, "running")
    world.fleet.ready = False
    assert await health(world) == (503, "no_engine")
    world.fleet.membership = fleet_view(State.RUNNING, State.STARTING)
    assert await health(world) == (503, "no_engine")
    world.fleet.membership = fleet_view(State.PAUSED, State.PAUSED)
    assert await health(world) == (200, "paused")
    world.fleet.membership = fleet_view(State.PAUSED, members=0)
    assert await health(world) == (503, "no_engine")
    world.fleet.membership = fleet_view(State.STOPPED, State.STOPPED)
    assert await health(world) == (503, "no_engine")
    world.fleet.membership = None
    assert await health(world) == (503, "no_engine")


async def test_a_front_that_leaves_is_not_healthy_and_takes_nothing(world) -> None:
    world.front.leaving = True
    assert await health(world) == (503, "leaving")
    answer = await world.complete()
    assert (answer.status, answer.error["code"]) == (503, "closed")


async def test_the_coordinators_absence_is_said_but_does_not_stop_a_front(world) -> None:
    world.fleet.coordinator_connected = False
    answer = await world.ask("GET", "/health")
    assert (answer.status, answer.json["coordinator"]) == (200, "away")
    assert (await world.complete()).status == 200


async def test_models_lists_the_one_that_is_served(world) -> None:
    listed = (await world.ask("GET", "/v1/models")).json
    assert listed["object"] == "list"
    assert [(m["id"], m["object"], m["max_model_len"]) for m in listed["data"]] == [("tiny", "model", 256)]
    assert (await world.ask("GET", "/v1/models/tiny")).json == listed["data"][0]


async def test_models_is_200_while_the_fleet_shall_serve_and_503_with_a_sentence_where_nobody_does(
    world, fleet_view
) -> None:
    world.fleet.membership = fleet_view(State.PAUSED, State.PAUSED)
    assert (await world.ask("GET", "/v1/models")).status == 200
    world.fleet.membership = fleet_view(State.SUSPENDED, State.SUSPENDED)
    assert (await world.ask("GET", "/v1/models")).status == 200
    for view, words in (
        (fleet_view(State.STOPPED, State.STOPPED), "interlock ctl start"),
        (fleet_view(State.STOPPED, members=0), "interlock ctl start"),
        (fleet_view(State.RUNNING, members=0), "No engine has joined"),
        (None, "No engine has joined"),
    ):
        world.fleet.membership = view
        for path in ("/v1/models", "/v1/models/tiny"):
            answer = await world.ask("GET", path)
            assert answer.status == 503
            assert words in answer.error["message"]


async def test_metrics_count_requests_tokens_and_the_fleet(world, step) -> None:
    await world.complete(max_tokens=3)
    await world.chat(max_tokens=4, stream=True)
    await world.complete(max_tokens=0)
    await world.complete(model="other")
    text = (await world.ask("GET", "/metrics")).body.decode()
    values = {
        (s.name, *sorted(s.labels.values())): s.value
        for f in text_string_to_metric_families(text)
        for s in f.samples
    }
    assert values["interlock_http_requests_total", "completions", "ok"] == 1
    assert values["interlock_http_requests_total", "chat", "ok"] == 1
    assert values["interlock_http_requests_total", "completions", "invalid"] == 2
    assert values["interlock_generated_tokens_total",] == 7
    assert values["interlock_time_to_first_token_seconds_count",] == 2
    prompt = sum(len(request.prompt) for request in world.fleet.requests)
    assert values["interlock_prompt_tokens_total",] == prompt
    assert values["interlock_cached_tokens_total",] == prompt - 2
    assert values["interlock_members", "RUNNING"] == 1
    assert values["interlock_epoch_number",] == 4
    assert values["interlock_epoch_term_number",] == 3


async def test_metrics_have_every_state_and_what_the_dispatcher_refused_and_pass_the_coordinators_on(
    world,
) -> None:
    world.fleet.counters = {"dispatches": 5, "refused_not_running": 2, "ended_length": 3, "overloaded": 1}
    text = (await world.ask("GET", "/metrics")).body.decode()
    values = {
        (s.name, *sorted(s.labels.values())): s.value
        for f in text_string_to_metric_families(text)
        for s in f.samples
    }
    assert values["interlock_members", "SUSPECT"] == 0
    assert values["interlock_target_info", "RUNNING"] == 1
    assert values["interlock_target_info", "PAUSED"] == 0
    assert values["interlock_holds", "keep"] == 0
    assert values["interlock_weights_info", "v1"] == 1
    assert values["interlock_dispatches_total",] == 5
    assert values["interlock_engine_refusals_total", "not_running"] == 2
    assert values["interlock_ended_requests_total", "length"] == 3
    assert values["interlock_refused_requests_total", "overloaded"] == 1
    assert values["interlock_coordinator_connected_info",] == 1
    assert values["interlock_coordinator_members",] == 1
    world.coordinator.error = ConnectionRefusedError("no\ncoordinator")
    text = (await world.ask("GET", "/metrics")).body.decode()
    assert "# the coordinator cannot be asked: no coordinator\n" in text
