import re
import time

from service.ids import new_id, uuid7


def test_an_id_names_its_kind() -> None:
    assert re.fullmatch(r"job_[0-9a-f]{12}7[0-9a-f]{3}[89ab][0-9a-f]{15}", new_id("job"))


def test_a_uuid_of_version_7_starts_with_the_time() -> None:
    before = time.time_ns() // 1_000_000
    value = uuid7()
    after = time.time_ns() // 1_000_000
    assert value.version == 7
    assert value.variant == "specified in RFC 4122"
    assert before <= value.int >> 80 <= after


def test_ids_are_unique_and_sort_by_birth() -> None:
    made = [new_id("job") for _ in range(2000)]
    assert len(set(made)) == len(made)
    early = new_id("job")
    time.sleep(0.002)
    assert early < new_id("job")
