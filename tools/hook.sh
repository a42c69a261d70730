#!/bin/sh
# A hook's command, of .venv where that is made (make dev), else of the path: committing needs no activated environment.
PATH="${VENV:-.venv}/bin:$PATH" exec "$@"
