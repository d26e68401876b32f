"""A server's configuration files as values: read, judged for a new production server, and written. Pure.

Called by actions/source_configuration.py, which finds the files of a recovered cluster's source. What comes
from a backup is data that others may have written: what would run a command, load a library, or let anybody
in comes back only when it is allowed by name.

Source: PostgreSQL, "Setting Parameters", "The pg_hba.conf File".
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

_ANYWHERE = {
    "ldap": "it has another server say who may come in",
    "radius": "it has another server say who may come in",
    "oauth": "it has another server say who may come in",
    "pam": "it has PAM say who may come in",
}
_BY_TCP = {"trust": "it lets in without a password", "ident": "it believes the client's machine"}
"""Methods of pg_hba.conf that ask for nothing of the cluster's own, and why each has to be allowed."""

HEADER = "# Made by `backup-pipeline promote` from the configuration of the cluster's source."
"""The first line of what is written: so a directory is known whose configuration is done."""

LEFT_OUT = "# left out: "
"""So begins a line that names what is left out; also a later run tells it by this."""

_LINE = re.compile(
    r"\s*(?P<name>[A-Za-z_\u0080-\uffff][\w$]*(?:\.[A-Za-z_\u0080-\uffff][\w$]*)?)(?:\s*=\s*|\s+)"
    r"(?P<value>'(?:[^'\\\n]|\\.|'')*'|[^\s#']+)\s*(?:#.*)?"
)
_ESCAPE = re.compile(r"''|\\([0-7]{1,3}|.)")
_ESCAPED = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_QUOTED = re.compile(r'"([^"]*)"')
_RULE_SECRET = re.compile(
    r'"(?P<whole>ldapbindpasswd|radiussecrets)=(?:[^"]|"")*"?'
    r'|(?P<value>ldapbindpasswd|radiussecrets)=(?:"[^"]*"?|[^\s"])*'
)
_INCLUDES = ("include", "include_if_exists", "include_dir")

_NO_STANDBY = "it is no standby, and recovers no more"
_OURS = {
    "archive_mode": "",
    "archive_command": "",
    "archive_library": "",
    "archive_timeout": "",
    "data_directory": "it names the source's place",
    "config_file": "it names the source's place",
    "hba_file": "it names the source's place",
    "ident_file": "it names the source's place",
    "external_pid_file": "it names the source's place",
    "restore_command": _NO_STANDBY,
    "archive_cleanup_command": _NO_STANDBY,
    "recovery_end_command": _NO_STANDBY,
    "primary_conninfo": _NO_STANDBY,
    "primary_slot_name": _NO_STANDBY,
    "synchronous_standby_names": "no standby follows it yet, and every commit would wait for one",
    "synchronized_standby_slots": "no standby follows it yet, and logical decoding would wait for one",
}
"""What never comes back, and why; "" for what we set ourselves."""

_CODE = ("_command", "_library", "_libraries", "library_path", "control_path", "jit_provider")
_CODE_IN_LANGUAGES = ("on_init", "on_plperl_init", "on_plperlu_init", "start_proc", "on_trusted_init")
_FILES = ("ssl_cert_file", "ssl_key_file", "ssl_ca_file", "ssl_crl_file", "ssl_crl_dir", "ssl_dh_params_file")
_OTHER_PATHS = ("krb_server_keyfile", "log_directory", "stats_temp_directory")
_TLS_NEEDS = {"ssl_cert_file": "server.crt", "ssl_key_file": "server.key"}


@dataclass(frozen=True)
class Setting:
    """One line of a configuration file."""

    name: str  # in small letters
    value: str
    where: str  # "postgresql.conf:12"


@dataclass(frozen=True)
class Decision:
    """Whether a setting comes back, and why not. `allowable` says that a person may have it back by name."""

    setting: Setting
    kept: bool
    reason: str = ""
    allowable: bool = False

    @property
    def line(self) -> str:
        """As postgresql.conf has it; what is left out, as a comment without its value."""
        if self.kept:
            return setting_line(self.setting.name, self.setting.value)
        return f"{LEFT_OUT}{self._named}"

    @property
    def shown(self) -> str:
        """For a person to read: what is left out, and what may hold a command, by its name and place."""
        return self._named if not self.kept or _is_code(self.setting.name) else self.line

    @property
    def _named(self) -> str:
        return f"{self.setting.name} ({self.setting.where})"


def parse_settings(text: str, name: str) -> tuple[tuple[Setting, ...], tuple[str, ...]]:
    """The settings of a file in order, includes among them, and the places of lines that cannot be read."""
    found, odd = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            odd.append(f"{name}:{number}")
        else:
            found.append(Setting(match["name"].lower(), _unquoted(match["value"]), f"{name}:{number}"))
    return tuple(found), tuple(odd)


def is_include(setting: Setting) -> bool:
    """Whether it names another file instead of being a setting."""
    return setting.name in _INCLUDES


def decide(
    settings: Iterable[Setting], *, allowed: Collection[str], exists: Callable[[str], bool]
) -> tuple[Decision, ...]:
    """Judge the settings that were in force: of several of one name the last. `exists` looks at a path."""
    in_force = {setting.name: setting for setting in settings}
    decisions = [_decide(setting, allowed, exists) for _, setting in sorted(in_force.items())]
    return tuple(
        _without_tls(each, in_force, exists) if each.setting.name == "ssl" else each for each in decisions
    )


def _decide(setting: Setting, allowed: Collection[str], exists: Callable[[str], bool]) -> Decision:
    name, value = setting.name, setting.value
    if name in _OURS or name.startswith("recovery_target"):
        return Decision(setting, False, _OURS.get(name, _NO_STANDBY))
    if _is_code(name) and value and name not in allowed:
        return Decision(setting, False, "it runs a command or loads a library", allowable=True)
    missing = [path for path in _paths(name, value) if not exists(path)]
    return Decision(setting, not missing, f"{', '.join(missing)} is not on this machine" if missing else "")


def _paths(name: str, value: str) -> Iterator[str]:
    """The places that have to be here for a setting to be of use."""
    if value and (name in _FILES or (name in _OTHER_PATHS and value.startswith("/"))):
        yield value
    elif name == "unix_socket_directories":
        places = (part.strip().strip('"') for part in value.split(","))
        yield from (place for place in places if place and not place.startswith("@"))


def _is_code(name: str) -> bool:
    return name.endswith(_CODE) or ("." in name and name.endswith(_CODE_IN_LANGUAGES))


def _without_tls(decision: Decision, found: Mapping[str, Setting], exists: Callable[[str], bool]) -> Decision:
    """The server would not start with TLS on and no certificate."""
    if decision.setting.value.lower() in ("off", "false", "no", "0", "of", "f", "n"):
        return decision
    for name, default in _TLS_NEEDS.items():
        path = found[name].value if name in found else default
        if not exists(path):
            return Decision(decision.setting, False, f"{path} is not on this machine: TLS WOULD BE OFF")
    return decision


def render(decisions: Iterable[Decision], notes: Iterable[str] = ()) -> str:
    """postgresql.conf: one line for each setting."""
    lines = [HEADER, *(f"# {note}" for note in notes)]
    lines += [each.line for each in decisions if each.kept or each.reason]
    return "\n".join(lines) + "\n"


def setting_line(name: str, value: str) -> str:
    """One setting, quoted, on one line whatever is in it."""
    quoted = value.replace("\\", "\\\\").replace("'", "''").replace("\n", "\\n").replace("\r", "\\r")
    return f"{name} = '{quoted}'"


@dataclass(frozen=True)
class Rule:
    """One line of pg_hba.conf or pg_ident.conf that says something."""

    text: str
    kept: bool
    reason: str = ""

    @property
    def shown(self) -> str:
        """For a person to read: without the passwords of LDAP and RADIUS."""
        return _RULE_SECRET.sub(lambda match: f"{match['whole'] or match['value']}=***", self.text)


def decide_rules(text: str, *, allowed: Collection[str]) -> tuple[Rule, ...]:
    """The rules in order. Those whose method has to be allowed come back when it is; includes never do."""
    joined = re.sub(r"\\\n", " ", text)
    lines = (line.strip() for line in joined.split("\n"))
    return tuple(_decide_rule(line, allowed) for line in lines if line and not line.startswith("#"))


def _decide_rule(line: str, allowed: Collection[str]) -> Rule:
    # A quoted name may hold what else would end a word, or begin a comment.
    plain = _QUOTED.sub(lambda match: re.sub(r"[\s#,]", "_", match[1]), line)
    words = plain.partition("#")[0].split()
    first = words[0].lower() if words else ""
    if first in _INCLUDES or any(re.search(r"(^|,)@", word) for word in words):
        return Rule(line, False, "it includes another file: write here what that said")
    for method, reason in _to_be_allowed(words):
        if method not in allowed:
            return Rule(line, False, f"{reason} (--allow {method} brings it back)")
    return Rule(line, True)


def _to_be_allowed(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Of a rule's words the methods that have to be allowed, wherever its lists end, and why."""
    kind = words[0].lower() if words else ""
    if kind.startswith("host"):
        methods, rest = _ANYWHERE | _BY_TCP, words[4:]
    elif kind == "local":  # there ident is peer
        methods, rest = _ANYWHERE, words[3:]
    else:
        return
    yield from ((word.lower(), methods[word.lower()]) for word in rest if word.lower() in methods)


def render_rules(rules: Iterable[Rule]) -> str:
    """The file again, with what is left out as comments."""
    return (
        "\n".join([HEADER, *(rule.text if rule.kept else f"{LEFT_OUT}{rule.shown}" for rule in rules)]) + "\n"
    )


def _unquoted(value: str) -> str:
    if not value.startswith("'"):
        return value

    def plain(match: re.Match[str]) -> str:
        escaped = match[1]
        if escaped is None:
            return "'"
        return chr(int(escaped, 8) & 0xFF) if escaped[0] in "01234567" else _ESCAPED.get(escaped, escaped)

    return _ESCAPE.sub(plain, value[1:-1])
