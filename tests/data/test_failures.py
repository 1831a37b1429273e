from convmae.data.failures import DecodingFailures


def test_each_image_is_listed_once_over_all_epochs_and_resumes(tmp_path):
    failures = DecodingFailures(tmp_path)
    failures.record(10, ["a.png: broken", "b.png: broken", "a.png: broken"])
    failures.record(10, ["a.png: broken"])
    resumed = DecodingFailures(tmp_path)
    resumed.record(10, ["b.png: broken", "c.png: broken"])
    assert (failures.count, resumed.count) == (2, 3)
    listed = (tmp_path / "undecodable-images.txt").read_text().splitlines()
    assert listed == ["a.png: broken", "b.png: broken", "c.png: broken"]


def test_no_failures_no_file(tmp_path):
    failures = DecodingFailures(tmp_path)
    failures.record(1000, [])
    assert failures.warning() is None
    assert list(tmp_path.iterdir()) == []


def test_only_more_than_a_few_percent_are_worth_a_warning(tmp_path):
    few, many, early, listed = (DecodingFailures(tmp_path) for _ in range(4))
    few.record(980, ["x"] * 20)
    many.record(960, ["x"] * 40)
    early.record(3, ["x"] * 3)
    listed.record(960, [])
    listed.list_once([f"annotation {number}" for number in range(40)])
    assert few.warning() is None
    assert early.warning() is None
    assert listed.warning() is None
    assert listed.count == 40
    assert "4% of the images cannot be decoded or used: see" in many.warning()
