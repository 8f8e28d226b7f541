#!/bin/bash
# The experiments with the tiny model, for one seed: four to five hours, beside another seed's.
#
#     bash results/reproduce.sh 42                      # the same with 43 and 44; then:
#     python results/tables.py                          # the tables of docs/results.md
#
# It can be stopped and started again. A run that was stopped is resumed, and a finished one is left
# alone. An evaluation that was stopped is repeated. The runs are runs/NAME-SEED, and their output is
# in runs/NAME-SEED.log.
set -e
export OMP_NUM_THREADS=1
seed=$1
more=${*:2}

stage() { # STAGE NAME FLAGS PROGRAM: a new run, or the rest of a stopped one
    run=runs/$2-$seed/$1
    if [ -e $run.finished ]; then return; fi
    flags="--name $2-$seed --overwrite $3"
    if [ -e $run/latest ]; then flags="--resume $run"; fi
    python "${@:4}" $flags >> runs/$2-$seed.log 2>&1
    tail -n 1 runs/$2-$seed.log | grep -q "; next: " || exit 1 # a signal has stopped it
    touch $run.finished
}

sft() { stage sft $1 "--seed $seed $2 $more" sft.py; }

grpo() { stage grpo $1 "--from runs/${3:-$1}-$seed/sft $2" grpo.py; } # the third: another run's SFT

evaluate() { # NAME FLAGS FILE
    table=runs/$1-$seed/$3
    if [ -e $table.finished ]; then return; fi
    rm -f $table.json # an evaluation that was stopped has written some of the rows
    python evaluate.py --name $1-$seed $2 >> runs/$1-$seed.log 2>&1
    touch $table.finished
}

train() { # NAME FLAGS: both stages
    sft $1 "$2"
    grpo $1
    evaluate $1 "--sweep length=1" evaluation-length=1
}

mkdir -p runs
sft default
grpo default
evaluate default "--sweep length=1,2,4,8" evaluation-length=1,2,4,8
evaluate default "--ablate" evaluation-ablate
evaluate default "--sweep retrieval=random" evaluation-retrieval=random

# operations switched off from the start
train no-update "--disable update"
train no-delete "--disable delete"
train no-update-delete "--disable update delete"
train no-scratchpad "--disable scratchpad"
train scratchpad-alone "--disable create read update delete"
train create-read "--disable update delete scratchpad"

# GRPO from the default run's SFT, under another setting
for setting in capacity=3 capacity=4 capacity=6 top_k=1 top_k=2 top_k=8 \
    disable=update disable=delete; do
    grpo $setting "--${setting/=/ }" default
    evaluate $setting "--sweep length=1" evaluation-length=1
done

# is the gain of GRPO more than that of more imitation?
train no-sft "--sft_steps 1"
sft sft-long "--sft_steps 2500" # as long as both stages of the default run
evaluate sft-long "--sweep length=1" evaluation-length=1
full="import tasks.demonstrators as d, sft; d.WORKFLOWS = {'full': 1.0}; sft.main()"
stage sft sft-full "--seed $seed $more" -c "$full" # demonstrations of the best workflow alone
evaluate sft-full "--sweep length=1" evaluation-length=1

# finer credit, where there is room for it: longer stories, more questions, a weaker start
credit() { # NAME KIND TASKS_PER_STEP
    start="--from runs/credit-$seed/sft --save_every 5 --tasks_per_step $3"
    stage grpo $1 "$start" -m forks.credit $2
    evaluate $1 "--sweep length=2" evaluation-length=2
}
sft credit "--length 2 --questions 4 --sft_steps 800"
evaluate credit "--sweep length=2" evaluation-length=2
credit credit-plain-8 plain 8
credit credit-plain plain 4
credit credit-hide hide 4
credit credit-branch branch 4
