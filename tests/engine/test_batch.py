from gemel.config import DynamicBatching, StaticBatching
from gemel.engine.request import Status
from tests.engine.simulation import Simulation


def running(sim: Simulation) -> list[int]:
    return [sequence.arrival for sequence in sim.scheduler.running]


def test_continuous_batching_joins_and_leaves_at_every_step():
    sim = Simulation()
    sim.add([1, 2], max_new=2)
    sim.step()
    sim.add([3, 4], max_new=4)
    sim.step()
    assert running(sim) == [1]  # the first has left while the second was joining
    sim.add([5, 6], max_new=2)
    sim.step()
    assert running(sim) == [1, 2]


def test_static_batching_waits_for_the_whole_batch():
    sim = Simulation(batching=StaticBatching(batch_size=2))
    for max_new in (2, 5, 2):
        sim.add([1, 2, 3], max_new)
    for _ in range(5):
        assert all(item.sequence.arrival < 2 for item in sim.step().work)
    assert running(sim) == []
    assert [item.sequence.arrival for item in sim.step().work] == [2]  # takes what there is


def test_static_batching_lets_nobody_fill_an_empty_seat():
    sim = Simulation(batching=StaticBatching(batch_size=4))
    sim.add([1, 2, 3], 4)
    sim.step()
    late = sim.add([1, 2, 3], 4)
    for _ in range(3):
        sim.step()
        assert late.status is Status.WAITING
    sim.step()
    assert late.status is Status.RUNNING


def test_a_static_batch_may_take_several_steps_to_start():
    sim = Simulation(max_step_tokens=8, batching=StaticBatching(batch_size=3))
    for start in range(4):
        sim.add([start] * 8, 3)
    sim.step()
    assert running(sim) == [0]  # the budget allows one prompt a step
    sim.step(), sim.step()
    assert running(sim) == [1, 2]  # the first is done, the fourth was not chosen
    sim.run()


def test_a_preempted_member_belongs_to_its_static_batch():
    sim = Simulation(num_blocks=5, batching=StaticBatching(batch_size=2))
    first, second = sim.add([1] * 7, 8), sim.add([2] * 7, 8)
    stranger = sim.add([3], 2)
    while first.status is not Status.FINISHED:
        sim.step()
        assert stranger.status is Status.WAITING
    assert second.num_preemptions > 0
    sim.run()


def test_a_preempted_member_rejoins_while_its_batch_runs():
    sim = Simulation(num_blocks=9, batching=StaticBatching(batch_size=3))
    sim.add([1] * 3, 20), sim.add([2] * 7, 8)
    member = sim.add([3] * 7, 8)
    while not member.num_preemptions:
        sim.step()
    while member.status is Status.WAITING:
        sim.step()
    assert running(sim) == [0, 2]  # the second has made room by ending, the first still runs
    sim.run()


def test_a_batch_that_was_preempted_as_a_whole_is_still_the_batch():
    sim = Simulation(batching=StaticBatching(batch_size=2))
    members = [sim.add([start] * 3, 4) for start in range(2)]
    sim.step()
    sim.reset()
    sim.add([9], 3, priority=-1)
    sim.step()
    assert sim.scheduler.running == members
    sim.run()


def test_dynamic_batching_starts_when_full():
    sim = Simulation(batching=DynamicBatching(batch_size=2, max_wait_s=10.0))
    sim.add([1, 2], 2)
    assert not sim.step().work
    sim.add([3, 4], 2)
    assert len(sim.step().work) == 2


def test_dynamic_batching_starts_when_the_oldest_has_waited():
    sim = Simulation(batching=DynamicBatching(batch_size=3, max_wait_s=0.5))
    sim.now_s = 7.0
    sim.add([1, 2], 2)
    sim.now_s = 7.4
    sim.add([3, 4], 2, priority=-1)  # more urgent, but not older
    assert not sim.step().work
    sim.now_s = 7.5
    assert [item.sequence.arrival for item in sim.step().work] == [1, 0]
