"""Cores and messages become ints and come back unchanged."""

import pytest

from interlock.checking.parts import Machine, Mail


def test_a_machine_makes_each_transition_once_and_gives_the_same_answer() -> None:
    made = []

    def transition(core: str, event: str) -> tuple[str, tuple[str, ...]]:
        made.append((core, event))
        if event == "never":
            raise ValueError(core)
        return core + event, (event,)

    machine = Machine(transition)
    first = machine.number("a")
    after, effects = machine.step(first, "b")
    assert (machine[after], effects) == ("ab", ("b",))
    assert machine.step(first, "b") == (after, effects)
    assert made == [("a", "b")]
    assert machine.number("ab") == after
    with pytest.raises(ValueError, match="a"):
        machine.step(first, "never")


def test_mail_is_a_set_that_only_grows() -> None:
    mail = Mail[str]()
    sent = mail.bit("one") | mail.bit("two")
    assert sent | mail.bit("one") == sent
    assert set(mail.read(sent)) == {"one", "two"}
    assert list(mail.read(0)) == []
    assert list(mail.read(mail.bit("two"))) == ["two"]
