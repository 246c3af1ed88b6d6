"""`scripts/hosts`: the commands of `network.Hosts` for a person."""

import argparse
import os
import sys

from .network import Hosts, HostsError

USAGE = """\
scripts/hosts [--net NAME] COMMAND

  up N | up HOST...            makes hosts: operator and host1 to hostN-1, or of these names; the first has the private key
  list                         their names, addresses and homes
  run HOST COMMAND...          a shell's command on a host
  cut A B, heal A B            what one sends to the other is lost, both ways
  isolate HOST, join HOST      the same for all others at once
  shape HOST [rate=100mbit] [delay=5ms] [loss=1%]
                               limits its link both ways, by tc; without any, no more
  freeze HOST, thaw HOST       stops its processes; lets them go on
  fill HOST FOLDER             until nothing more fits into its /dev/shm, /tmp or /run
  reboot HOST [hard]           kills what runs there, empties /tmp, /dev/shm and /run; hard: peers see no connection close
  halt HOST [hard], boot HOST  the two halves of it
  down                         takes all away
"""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/hosts", usage=USAGE)
    parser.add_argument("--net", default="pdserve")
    parser.add_argument("command", nargs="?", default="")
    parser.add_argument("words", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    try:
        return act(Hosts(options.net), options.command, options.words)
    except (HostsError, TypeError) as error:  # the wrong number of words
        print(f"hosts: {error}", file=sys.stderr)
        return 1


def act(hosts: Hosts, command: str, words: list[str]) -> int:
    match command, words:
        case "up", [number] if number.isdecimal():
            hosts.up(["operator", *(f"host{index}" for index in range(1, int(number)))])
        case "up", [_, *_]:
            hosts.up(words)
        case "list", []:
            for name in hosts.names():
                print(f"{name}\t{hosts.address(name)}\t{hosts.home(name)}")
        case "run", [host, _, *_]:
            there = hosts.command(host, " ".join(words[1:]))
            os.execvp(there[0], there)
        case (("cut" | "heal"), [one, other]):
            getattr(hosts, command)(one, other)
        case (("isolate" | "join" | "freeze" | "thaw" | "boot"), [host]):
            getattr(hosts, command)(host)
        case (("halt" | "reboot"), [host, *hard]) if hard in ([], ["hard"]):
            getattr(hosts, command)(host, hard=bool(hard))
        case "shape", [host, *limits]:
            hosts.shape(host, **dict(limit.split("=", 1) for limit in limits))
        case "fill", [host, folder]:
            hosts.fill(host, folder)
        case "down", []:
            hosts.down()
        case _:
            raise HostsError(f"got {' '.join([command, *words])!r}, expected one of:\n{USAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
