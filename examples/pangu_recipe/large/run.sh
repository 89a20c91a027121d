#!/bin/bash
# The large form: a teacher and a student from the Hub, GSM8K as text, a GPU.   bash run.sh TRAIN.jsonl TEST.jsonl FOLDER
# TEACHER and STUDENT name others of one tokenizer.  Stopped, the same command goes on: what is done is not done again.
# The lines of teacher-dump and of student-train share nothing but folders: they may run on machines of their own.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
train=$(realpath "${1:?GSM8K, train.jsonl}") test=$(realpath "${2:?GSM8K, test.jsonl}") folder="${3:?a folder for all of it}"
teacher="${TEACHER:-Qwen/Qwen3-8B}" student="${STUDENT:-Qwen/Qwen3-0.6B}"
mkdir -p "$folder" && cd "$folder"

[ -e corpus/test.jsonl ] || python "$here/gsm8k.py" "$train" "$test" corpus
for split in train dev; do
    teacher-dump run "$here/dump.yaml" --set teacher.model="$teacher" \
        --set data.files="[corpus/$split.jsonl]" --set output="dumps/$split" ${DUMP_ARGS:-}
done
student-train run "$here/recipe.yaml" --set student.model="$student" ${TRAIN_ARGS:-}
student-train rollout "$here/rollout.yaml" ${ROLLOUT_ARGS:-}
teacher-dump run "$here/dump.yaml" --set teacher.model="$teacher" \
    --set data.files='[rollouts/data]' --set data.source_field=source --set output=dumps/rollouts ${DUMP_ARGS:-}
student-train run "$here/round.yaml" ${ROUND_ARGS:-}
for model in students/reasoning/model students/fast/model students/distil/model round/model; do
    for manner in reasoning fast; do
        student-train eval "$here/eval.yaml" --set student.model="$model" --set data.manner="$manner" \
            --set output="eval/$manner-${model//\//-}" ${EVAL_ARGS:-}
    done
done
student-train report students
