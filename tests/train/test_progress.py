"""What the driver reads of a file that workers write, cut and write again."""

import json

from recsys_dist.train.progress import Place, read


def test_each_line_is_read_once_when_it_is_whole_and_again_from_a_file_that_was_cut(tmp_path):
    file, place = tmp_path / "progress.jsonl", Place()

    def follow() -> list[int]:
        nonlocal place
        found = list(read(file, place))
        place = found[-1][1] if found else place
        return [line["step"] for line, _ in found]

    def text(*steps: int) -> str:
        return "".join(json.dumps({"step": step}) + "\n" for step in steps)

    assert follow() == []
    file.write_text(text(1, 2) + '{"st')
    assert follow() == [1, 2]
    with file.open("a") as stream:
        stream.write('ep": 3}\n')
    assert follow() == [3] and follow() == []
    cut = tmp_path / "cut"
    cut.write_text(text(1, 20) + text(30, 40))  # as a restarted run: it already has more bytes again
    cut.replace(file)
    assert follow() == [1, 20, 30, 40] and follow() == []
