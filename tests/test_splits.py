"""Held-out images: whole groups, the same in every process, never all."""

from collections import Counter
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.sources import of_pixels, whole
from tests.test_fuzz import assert_short_line
from vae_dist.config import DataConfig
from vae_dist.data.groups import groups_of
from vae_dist.data.source import DataInfo, InMemory, Source, every_name
from vae_dist.data.splits import default_held_out, hold_out, with_test_part
from vae_dist.errors import UserError
from vae_dist.plan import FIXED_SEED, Stream, permutation


def named(names: list[str]) -> InMemory:
    """Images with these names; an image's first pixels are its number."""
    count = len(names)
    pixels = torch.arange(count, dtype=torch.int32).view(torch.uint8).view(count, 1, 2, 2)
    return InMemory(DataInfo("named", count, (1, 2, 2), None, "numbers", "an identity"), pixels, None, names)


def names_of(source: Source) -> list[str]:
    return list(every_name(source) or ())


def settings(**changes: object) -> DataConfig:
    return DataConfig(name="array", path="own.npy", **changes)  # type: ignore[arg-type]


def numbered(count: int) -> list[str]:
    return [f"{number:05}.png" for number in range(count)]


def test_images_without_names_are_held_out_by_the_plan_s_permutation() -> None:
    source = of_pixels(torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1))
    for count in (0, 7):
        rest, held_out = hold_out(source, count, settings(), "validation")
        order = permutation(FIXED_SEED, Stream.SPLIT, 0, 40).tolist()
        assert whole(held_out).pixels.flatten().tolist() == sorted(order[:count])
        assert whole(rest).pixels.flatten().tolist() == sorted(order[count:])


def test_named_images_are_held_out_in_the_order_of_their_names_hashes() -> None:
    names = numbered(300)
    order = sorted(names, key=lambda name: sha256(f"{FIXED_SEED} test image {name}".encode()).digest())
    rest, held_out = hold_out(named(names), 30, settings(), "test")
    assert names_of(held_out) == sorted(order[:30]) and names_of(rest) == sorted(order[30:])
    assert whole(held_out).pixels.flatten(1)[:, :2].tolist() == [
        [int(name[:5]) % 256, int(name[:5]) // 256] for name in names_of(held_out)
    ]


def test_each_purpose_has_an_order_of_its_own() -> None:
    test, validation = (set(names_of(hold_out(named(numbered(300)), 150, settings(), purpose)[1]))
                        for purpose in ("test", "validation"))  # fmt: skip
    assert 50 < len(test & validation) < 100  # half of them, if they are independent


def test_images_that_are_added_later_move_few_others() -> None:
    before = set(names_of(hold_out(named(numbered(1000)), 100, settings(), "test")[1]))
    after = set(names_of(hold_out(named(numbered(1100)), 110, settings(), "test")[1]))
    old = set(numbered(1000))
    assert len(before ^ (after & old)) < 20  # 180 of a new draw


@given(st.lists(st.sampled_from("abcdefgh"), min_size=4, max_size=40), st.integers(1, 10), st.data())
def test_no_group_is_on_two_sides(letters: list[str], count: int, data: st.DataObject) -> None:
    names = [f"{letter}_{number}.png" for number, letter in enumerate(letters)]
    config = settings(group=data.draw(st.sampled_from(["^([a-z])_", "[a-z]", "^[a-c]", "([a-b])_|x"])))
    groups = dict(zip(names, groups_of(names, config.group), strict=True))
    sizes = Counter(groups.values())
    try:
        rest, held_out = hold_out(named(names), count, config, "test")
    except UserError as error:
        assert_short_line(str(error))
        too_large = 2 * max(sizes.values()) > len(names)
        assert count >= len(names) or too_large or "holds out whole groups" in str(error)
        return
    sides = [names_of(rest), names_of(held_out)]
    assert sorted(sides[0] + sides[1]) == sorted(names) and all(sides)
    assert not {groups[name] for name in sides[0]} & {groups[name] for name in sides[1]}
    smallest = len(sides[1]) - max(sizes[groups[name]] for name in sides[1])
    assert smallest < count <= len(sides[1])  # no more groups than it takes


def test_an_expression_s_first_group_or_whole_match_names_the_group() -> None:
    names = ["cat-1.png", "cat-2.png", "dog-1.png", "1.png"]
    assert groups_of(names, "^[a-z]+") == ["group cat", "group cat", "group dog", "image 1.png"]
    assert groups_of(names, "([a-z]+)-") == ["group cat", "group cat", "group dog", "image 1.png"]
    assert groups_of(names, "(cat)|[0-9]") == ["group cat", "group cat", "image dog-1.png", "image 1.png"]
    assert len(set(groups_of(["1", "x1"], "x(.)"))) == 2  # an image that does not match shares no group's name
    assert groups_of(["a" * 1000 + "x"], "x") == [f"image {'a' * 1000}x"]  # what is searched of a name is bounded


def test_the_split_is_the_same_in_every_process_and_on_every_machine() -> None:
    _, held_out = hold_out(named(numbered(200)), 3, settings(), "test")
    assert names_of(held_out) == ["00014.png", "00082.png", "00174.png"]
    assert held_out.info.identity[:16] == "209c4c6a2157c07b"


def test_the_identities_of_the_parts_follow_the_chosen_images() -> None:
    source = named([f"{letter}{number}" for letter in "abcd" for number in range(5)])
    identities = set()
    for config in (settings(), settings(group="^[a-z]"), settings(group="^[a-c]")):
        identities |= {part.info.identity for part in hold_out(source, 5, config, "test")}
    unnamed = of_pixels(source.pixels)
    for count in (4, 5):
        identities |= {part.info.identity for part in hold_out(unnamed, count, settings(), "test")}
    assert len(identities) == 10


def write_table(text: str) -> str:
    Path("groups.csv").write_text(text)
    return "groups.csv"


def test_a_table_names_the_groups(tmp_path: Path) -> None:
    rule = write_table('\ufeffgroup,size,name\nfirst,1,a.png\nfirst,2,"b, c.png"\n\n,3,d.png\nx,4,gone.png\n')
    for path in (rule, f"~/{rule}"):  # the home is this folder
        assert groups_of(["a.png", "b, c.png", "d.png"], path) == ["group first", "group first", "group "]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (None, "groups.csv can't be read .No such file"),
        ("", "must begin with the line name,group"),
        ("a.png,1\n", "must begin with the line name,group, not 'a.png,1'"),
        ("name,group,name\n", "must begin with the line name,group"),
        ("name,group\na.png,1\n", "lacks 1 of 2 images .'b.png'.; give each image a line"),
        ("name,group\na.png,1\nb.png,1\na.png,2\n", "has 'a.png' twice; leave one"),
        ("name,group\na.png\n", "row 2 has 1 values, not 2"),
        ("name,group\na.png,1\nb.png,2,3\n", "row 3 has 3 values, not 2"),
        ('name,group\n"a.png,1\n', "is no CSV file"),
        ("name,group\n" + "x" * 200_000 + ",1\n", "is no CSV file"),
        (b"name,group\n\xff,1\n", "is no CSV file in UTF-8"),
    ],
)
def test_a_table_that_can_not_be_used_is_named(table: str | bytes | None, message: str) -> None:
    if table is not None:
        Path("groups.csv").write_bytes(table if isinstance(table, bytes) else table.encode())
    with pytest.raises(UserError, match=message) as refusal:
        groups_of(["a.png", "b.png"], "groups.csv")
    assert_short_line(str(refusal.value))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("(", r"data.group=\( is no regular expression"),
        ("a{99999999999}", "is no regular expression"),
        ("(?:" * 100 + "a" + ")" * 100, "no regular expression|matches none"),
        ("a" * 501, "data.group has 501 characters; 500 are the most"),
        ("x", "data.group=x matches none of the 20 names, such as '00000.png'; change the expression"),
        ("png", "too coarse: the group 'png' has 20 of the 20 images"),
        ("^0000", "too coarse: the group '0000' has 11 of the 20 images that are to be split"),
    ],
)
def test_an_expression_that_can_not_be_used_is_refused(rule: str, message: str) -> None:
    names = numbered(20) if rule != "^0000" else [*numbered(9), "0000x", "0000y", *map(str, range(50, 59))]
    with pytest.raises(UserError, match=message) as refusal:
        with_test_part(named(names), None, settings(group=rule))
    assert_short_line(str(refusal.value))


def test_a_group_of_half_the_images_may_be_held_out_but_never_all() -> None:
    names = ["a1", "a2", "b1", "b2"]
    rest, held_out = hold_out(named(names), 1, settings(group="."), "test")
    assert sorted([names_of(rest), names_of(held_out)]) == [["a1", "a2"], ["b1", "b2"]]
    assert names_of(hold_out(named(names), 0, settings(group="$"), "test")[0]) == names
    with pytest.raises(
        UserError, match=r"test_images=3 leaves nothing of 4 training images, as data.group=. holds out"
    ):
        hold_out(named(names), 3, settings(group="."), "test")


@pytest.mark.parametrize("count", [2, 3, 5, 9, 10, 11, 20])
def test_a_tiny_set_has_a_test_image_that_training_never_sees(count: int) -> None:
    training, test = with_test_part(named(numbered(count)), None, settings())
    assert test.info.count == max(count // 10, 1) and training.info.count + test.info.count == count
    assert not set(names_of(training)) & set(names_of(test))
    left, validation = hold_out(training, default_held_out(training.info.count), settings(), "validation")
    assert left.info.count > validation.info.count or validation.info.count == 0


def test_a_tenth_is_held_out_and_at_most_5000() -> None:
    assert [default_held_out(count) for count in (9, 10, 999, 50_000, 60_000, 10**9)] == [0, 1, 99, 5000, 5000, 5000]


def test_one_image_is_too_few() -> None:
    with pytest.raises(UserError, match=r"own.npy has one image; a training needs at least two"):
        with_test_part(named(["a"]), None, settings())


def test_a_test_part_of_the_set_is_taken_as_it_is() -> None:
    training, test = named(["a", "b"]), named(["c"])
    assert with_test_part(training, test, settings()) == (training, test)
    with pytest.raises(UserError, match=r"has 1 test images of its own: use data.test_images=null"):
        with_test_part(training, test, settings(test_images=1))
    with pytest.raises(UserError, match="matches none"):
        with_test_part(training, test, settings(group="x"))


def test_as_many_as_asked_are_held_out() -> None:
    for count in (1, 11):  # fewer and more than a tenth
        training, test = with_test_part(named(numbered(30)), None, settings(test_images=count))
        assert (training.info.count, test.info.count) == (30 - count, count)
    with pytest.raises(UserError, match=r"data.test_images=30 leaves nothing of 30"):
        with_test_part(named(numbered(30)), None, settings(test_images=30))
