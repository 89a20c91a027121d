#!/bin/bash
# Rounds of offline on-policy distillation: the student writes, the teacher scores, the student learns.
#   bash rounds.sh MODEL [ROUNDS]     in a folder with corpus/, teachers/ and dumps/fast, as `run.py pipeline` leaves it
# The two sides share nothing but folders, so each of the three lines may run on a machine of its own.  Stopped, the same
# command goes on: what is done is not done again.
set -euo pipefail
model="${1:?the model that the first round begins with}"
rounds="${2:-2}"
here=$(cd "$(dirname "$0")" && pwd)

for (( round = 1; round <= rounds; round++ )); do
    student-train rollout "$here/rollout.yaml" \
        --set student.model="$model" --set output="rollouts-$round" --set seed="$round"
    teacher-dump run "$here/dump.yaml" \
        --set data.files="[rollouts-$round/data]" --set data.source_field=source --set output="dumps/rollouts-$round"
    student-train run "$here/round.yaml" --set student.model="$model" --set output="round-$round" --set seed="$round" \
        --set data="{mix: [{dataset: dumps/fast, manner: fast, weight: 1}, {dataset: dumps/rollouts-$round, weight: 1}]}"
    model="round-$round/model"
done
