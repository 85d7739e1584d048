"""`python -m undimix_plugins methods` lists all methods with their source, equation and supported toolkits."""

from __future__ import annotations

import argparse
import shutil

from undimix_plugins.methods.catalogue import markdown, table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m undimix_plugins")
    commands = parser.add_subparsers(dest="command", required=True)
    methods = commands.add_parser("methods", help="list all methods with source, equation and where each works")
    methods.add_argument("--markdown", action="store_true", help="as the table of the manual")
    args = parser.parse_args()
    print(markdown() if args.markdown else table(shutil.get_terminal_size().columns))


if __name__ == "__main__":
    main()
