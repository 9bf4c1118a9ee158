"""Files that the command line writes, where others can write too: links and pipes that are planted
there lead nowhere, and a user's own go on working."""

import os
import stat

import pytest

from helpers.cli import ksmcore, write
from ksmcore.cli.output import OutputFile

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture
def shared(tmp_path):
    """A directory in which everybody can write."""
    directory = tmp_path / "shared"
    directory.mkdir()
    directory.chmod(0o1777)
    return directory


@pytest.fixture
def victim(tmp_path):
    """A file that must stay as it is."""
    file = tmp_path / "victim"
    file.write_text("precious")
    yield file
    assert file.read_text() == "precious"


def given_away(path):
    os.lchown(path, NOBODY, NOBODY)
    return path


def linked(path, target):
    path.symlink_to(target)
    return path


# ---- what is there from the beginning ------------------------------------------------------------


@as_root
@pytest.mark.parametrize("mode", [0o1777, 0o777])
@pytest.mark.parametrize("name", ["out", "way/out", "way/../way/out"])
def test_a_link_of_another_user_where_everybody_can_write_is_refused(
    shared, tmp_path, victim, mode, name
):
    shared.chmod(mode)
    (tmp_path / "elsewhere").mkdir()
    given_away(linked(shared / "out", victim))
    given_away(linked(shared / "way", tmp_path / "elsewhere"))
    with pytest.raises(PermissionError, match=f"user {NOBODY} has put it where everybody can"):
        OutputFile(f"{shared}/{name}")
    assert os.listdir(tmp_path / "elsewhere") == []


@as_root
def test_a_link_to_nothing_of_another_user_makes_no_file(shared, tmp_path):
    given_away(linked(shared / "out", tmp_path / "new"))
    with pytest.raises(PermissionError):
        OutputFile(f"{shared}/out")
    # One's own link to the other's does not make that better.
    with pytest.raises(PermissionError):
        OutputFile(str(linked(tmp_path / "own", shared / "out")))


@as_root
def test_a_pipe_of_another_user_where_everybody_can_write_is_refused(shared):
    os.mkfifo(shared / "out")
    given_away(shared / "out")
    with pytest.raises(PermissionError, match="everybody can write"):
        OutputFile(f"{shared}/out")


@as_root
def test_the_command_line_refuses_a_planted_link_before_the_program_begins(
    shared, tmp_path, victim
):
    given_away(linked(shared / "out", victim))
    write(tmp_path, "print('begun')")
    for command in (("run", "--report"), ("run", "--json"), ("estimate", "--json")):
        done = ksmcore(*command, shared / "out", "program.py", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert "has put it where everybody can write" in done.stderr


def test_ones_own_links_lead_where_they_lead(shared, tmp_path):
    (tmp_path / "real").mkdir()
    linked(shared / "way", tmp_path / "real")
    for name, target in (("first", "way/one"), ("second", "../real/two")):
        linked(shared / name, target)
        OutputFile(f"{shared}/{name}").write("text")
        assert (shared / name).is_symlink()
    assert [(tmp_path / "real" / name).read_text() for name in ("one", "two")] == ["text"] * 2


@as_root
def test_a_link_of_the_directorys_owner_is_followed(shared, tmp_path):
    given_away(shared)
    given_away(linked(shared / "out", tmp_path / "real"))
    OutputFile(f"{shared}/out").write("text")
    assert (tmp_path / "real").read_text() == "text"


@as_root
def test_a_link_of_another_user_where_only_he_can_write_is_followed(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    given_away(home)
    given_away(linked(home / "out", tmp_path / "real"))
    OutputFile(f"{home}/out").write("text")
    assert (tmp_path / "real").read_text() == "text"


def test_links_in_a_circle(tmp_path):
    linked(tmp_path / "a", "b")
    linked(tmp_path / "b", "a")
    with pytest.raises(OSError, match="Too many levels"):
        OutputFile(f"{tmp_path}/a")


# ---- what is put there while the program runs ----------------------------------------------------


def test_a_link_that_comes_later_is_replaced(shared, victim):
    file = OutputFile(f"{shared}/out")
    linked(shared / "out", victim)
    file.write("text")
    assert not (shared / "out").is_symlink()
    assert (shared / "out").read_text() == "text"


@pytest.mark.parametrize("part", ["in", "in/ner"])
def test_a_directory_that_a_link_has_replaced_is_not_written_to(shared, tmp_path, part):
    (shared / "in/ner").mkdir(parents=True)
    (tmp_path / "elsewhere/ner").mkdir(parents=True)
    file = OutputFile(f"{shared}/in/ner/out")
    (shared / part).rename(shared / "away")
    linked(shared / part, tmp_path / "elsewhere")
    with pytest.raises(NotADirectoryError):
        file.write("text")
    assert not [name for _, _, names in os.walk(tmp_path) for name in names]


def test_a_pipe_that_a_link_has_replaced_is_not_written_to(shared, victim):
    os.mkfifo(shared / "out")
    file = OutputFile(f"{shared}/out")
    (shared / "out").unlink()
    linked(shared / "out", victim)
    with pytest.raises(PermissionError, match="something else by now"):
        file.write("text")


def test_no_name_of_an_unfinished_file_can_be_known(shared, tmp_path, victim):
    """Whoever knows the program's command and number knows nothing yet."""
    script = f"""
        import os
        for name in ("out", "r.json"):
            for number in (os.getpid(), os.getppid()):
                os.symlink({str(victim)!r}, f"{{name}}.{{number}}")
                os.symlink({str(victim)!r}, f".{{name}}.{{number}}")
    """
    write(shared, script)
    done = ksmcore("run", "--quiet", "--json", "r.json", "program.py", cwd=shared)
    assert (done.returncode, done.stderr) == (0, "")
    assert (shared / "r.json").is_file()
    assert not (shared / "r.json").is_symlink()


def test_nothing_unfinished_is_left(tmp_path, monkeypatch):
    file = OutputFile(f"{tmp_path}/out")

    def interrupt(*_, **__):
        assert len(os.listdir(tmp_path)) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        file.write("text")
    assert os.listdir(tmp_path) == []


# ---- who may do what with it ---------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(0o640, 0o640), (0o4666, 0o666), (0o1777, 0o777)])
def test_modes_stay_but_for_those_of_programs(tmp_path, before, after):
    (tmp_path / "out").write_text("old")
    (tmp_path / "out").chmod(before)
    OutputFile(f"{tmp_path}/out").write("new")
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == after


@as_root
def test_a_file_of_another_user_does_not_let_him_write(shared):
    (shared / "out").write_text("old")
    (shared / "out").chmod(0o666)
    given_away(shared / "out")
    OutputFile(f"{shared}/out").write("new")
    found = (shared / "out").stat()
    assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (0, 0o644)


def test_a_file_that_cannot_be_replaced_is_refused_before_the_program_begins(shared, monkeypatch):
    (shared / "out").write_text("another's")
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.raises(PermissionError, match="it is another user's"):
        OutputFile(f"{shared}/out")


# ---- what is no file, and what has no name -------------------------------------------------------


def test_a_descriptor_of_a_file_without_a_name(tmp_path):
    fd = os.memfd_create("results")
    os.write(fd, b"something longer than the text")
    OutputFile(f"/dev/fd/{fd}").write("text")
    assert os.pread(fd, 100, 0) == b"text"
    os.close(fd)


def test_a_pipe_by_its_descriptor():
    reading, writing = os.pipe()
    OutputFile(f"/dev/fd/{writing}").write("text")
    os.close(writing)
    assert os.read(reading, 100) == b"text"
    os.close(reading)


def test_what_is_no_text_is_written_out(tmp_path):
    OutputFile(f"{tmp_path}/out").write("caf\udce9")
    assert (tmp_path / "out").read_text() == "caf\\udce9"
