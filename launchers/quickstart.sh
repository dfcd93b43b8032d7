#!/usr/bin/env bash
# Sets up and trains: a small hybrid model on two sequence-parallel ranks, on text that Python itself carries.
#
#   bash launchers/quickstart.sh                               about two minutes of training on two cores
#   bash launchers/quickstart.sh context_length=16k steps=50   with any overrides of `longtrain train`
#
# It ends by comparing the loss with the unigram entropy of the bytes, the best that a model without memory can do.
# Run it again after an interruption and it goes on from the last checkpoint.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

exec longtrain train "$@"
