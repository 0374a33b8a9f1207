#!/usr/bin/env bash
# `fewbit chat` as a person sees it: in tmux, with SmolLM2, each step asserted by what stands on the screen.
#
#   quant-tests/chat/run.sh
#
# Needs tmux, Python with pip; the network for crates.io and PyPI. Screens lie in scratch/chat afterwards.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if ! command -v tmux >/dev/null; then
    echo "$0: needs tmux (Debian: apt-get install tmux)" >&2
    exit 1
fi
quant-tests/fetch-smollm2.sh downloads
model=$PWD/downloads/smollm2.gguf
if [ -z "${FEWBIT:-}" ]; then
    ${CARGO:-cargo} build --release --package fewbit
    FEWBIT=$PWD/${CARGO_TARGET_DIR:-target}/release/fewbit
fi
patience=${PATIENCE:-120}

work=$(mktemp -d)
screens=$PWD/scratch/chat
mkdir -p "$screens"
export LC_ALL=C.UTF-8 HOME=$work XDG_STATE_HOME=$work/state
unset NO_COLOR TMUX
tmux() { command tmux -L "fewbit-$$" -f /dev/null "$@"; }
clean() {
    tmux kill-server 2>/dev/null || true
    rm -rf "$work"
}
trap clean EXIT
# The server stays between two conversations.
tmux new-session -d -s server 'exec cat'

# Starts `fewbit chat` with these arguments on a screen of $1 columns and 30 rows. What it ends with is shown.
# What stands in $environment is set for it.
environment=
start() {
    local columns=$1
    shift
    tmux kill-session -t chat 2>/dev/null || true
    printf -v line '%q ' "$FEWBIT" chat -m "$model" "$@"
    tmux new-session -d -s chat -x "$columns" -y 30 "cd $work; $environment $line; echo \"(ended with \$?)\"; exec cat"
    tmux set-option -t chat history-limit 5000 >/dev/null
}

# The screen with all that has left it above; with colours if $1 is -e.
screen() { tmux capture-pane -p -J -t chat -S - "$@" | sed "s/ *$//"; }

fail() {
    echo "FAILED: $step: $1" >&2
    screen >&2
    exit 1
}

# Waits for text (a regular expression that grep -E knows) that stands on the screen $2 times (once) at least.
see() {
    local wanted=${2:-1}
    for _ in $(seq $((patience * 10))); do
        if [ "$(screen | grep -cE -- "$1" || true)" -ge "$wanted" ]; then
            return
        fi
        sleep 0.1
    done
    fail "no ${wanted}× $1"
}

see_not() {
    if screen | grep -qE -- "$1"; then
        fail "there is $1"
    fi
}

# How often something stands on the screen.
count() { screen | grep -cE -- "$1" || true; }

# Types a line.
type_line() {
    tmux send-keys -t chat -l -- "$1"
    tmux send-keys -t chat Enter
}
keys() { tmux send-keys -t chat "$@"; }

# Asks, and waits for the answer's end.
ask() {
    local before
    before=$(count '^\[[0-9]+ token')
    type_line "$1"
    see '^\[[0-9]+ token.*context [0-9]+ of [0-9]+' $((before + 1))
}

step() {
    step=$1
    echo "  $1"
}

# Waits until an answer has grown twice.
grows() {
    local size now more=0
    size=$(screen | wc -c)
    for _ in $(seq $((patience * 10))); do
        now=$(screen | wc -c)
        if [ "$now" -gt "$size" ]; then
            size=$now more=$((more + 1))
        fi
        [ "$more" -lt 2 ] || return 0
        sleep 0.1
    done
    fail "the answer does not grow"
}

# What stands between the last prompt with a question and the status line after it.
last_answer() {
    screen | awk '/^> ./ { text = "" ; next } /^\[[0-9]+ token/ { last = text; next } { text = text $0 "\n" } END { printf "%s", last }'
}

step "greeting and an answer"
start 100 --temp 0 -n 24
see 'smollm2: .* template\. /help lists'
see '^>'
ask "Hello! How are you?"
greeting=$(last_answer)
[[ $greeting == *[a-z][a-z][a-z]* ]] || fail "no answer"
see 'tok/s; context [0-9]+ of [0-9]+'

step "commands are listed, wrong ones named"
type_line "/help"
see '/retry +answer the last question anew'
type_line "/hlep"
see 'there is no /hlep'
keys -l "/sta"
keys Tab
keys Enter
see '^turns +1 question$'

step "messages of several lines: a backslash, Alt-Enter, a block, a paste"
type_line 'One line \'
ask 'and another. Say yes.'
keys -l 'Alt'
keys M-Enter
ask 'Enter. Say yes.'
type_line '"""'
type_line 'A block'
type_line 'of lines.'
ask '"""'
printf 'Pasted\nlines.\nSay yes.' | tmux load-buffer -
tmux paste-buffer -p -t chat
ask ''
type_line "/stats"
see '^turns +5 questions$'

step "an answer streams, and Ctrl-C stops it"
# Token 2 ends SmolLM2's answers: without it they do not.
type_line '/set logit_bias {"2": false}'
type_line "/set n 2000"
type_line "Tell me a very long story about a dragon, with many chapters."
grows
see_not '; stopped\]'
keys C-c
see '; stopped\]'
type_line "/stats"
see '^turns +6 questions$'

step "what was stopped goes on, and is taken back"
type_line '/set logit_bias {}'
type_line "/set n 8"
ask "Who was it about?"
type_line "/undo"
see 'Taken back: Who was it about\? \(6 questions left\)'
type_line "/undo"
see 'Taken back: Tell me a very long story.*\(5 questions left\)'

step "an answer is given anew"
type_line "/set n 16"
ask "What is the capital of Italy?"
first=$(last_answer)
ask "/retry"
[ "$(last_answer)" = "$first" ] || fail "another answer at temperature 0: $(last_answer)"
type_line "/set temperature -1"
see 'temperature: must be a number, 0 or more'
type_line "/set temperature 1.5"
type_line "/set seed 7"
type_line "/set"
see '^temperature +1\.5$'
see '^seed +7$'
type_line "/set temperature 0"

step "the system message"
type_line "/system Answer in one word."
type_line "/system"
see '^Answer in one word\.$'
type_line "/system @absent.txt"
see 'absent.txt: cannot read the text'

step "saved, and gone on with"
type_line "/save $work/first.session"
see 'Saved to .*first.session: 6 questions, [0-9]+ tokens'
ask "And of Spain?"
wanted=$(last_answer)
type_line "/reset"
see 'The conversation starts anew'
type_line "/quit"
see '\(ended with 0\)'
screen -e >"$screens/first.ansi"

step "taken up in another process, it goes on as it would have"
start 100 --temp 0 -n 16
see '^>'
type_line "/load $work/first.session"
see 'Taken up from .*first.session: 6 questions, [0-9]+ tokens'
ask "And of Spain?"
[ "$(last_answer)" = "$wanted" ] || fail "another answer after /load: $(last_answer)"
keys C-d
see '\(ended with 0\)'

step "--session keeps it without being asked"
start 100 --temp 0 -n 12 --session "$work/kept.session"
see '^>'
ask "What is the capital of Norway?"
keys C-d
see 'Saved to .*kept.session: 1 question,'
see '\(ended with 0\)'
start 100 --temp 0 -n 12 --session "$work/kept.session"
see 'Taken up from .*kept.session: 1 question, [0-9]+ tokens in 0\.[0-9] s'
ask "And of Sweden?"
# Only what is new was read.
screen | grep -qE '^\[([1-9]|[1-3][0-9]) tokens? read' || fail "too much was read"
type_line "/quit"
see '\(ended with 0\)'

step "a damaged session is refused"
printf 'damaged!' | dd of="$work/kept.session" bs=1 seek=5000 conv=notrunc status=none
start 100 --session "$work/kept.session"
see 'kept.session: byte [0-9]+: .*start anew'
see '\(ended with 1\)'

step "history"
start 100 --temp 0 -n 8
see '^>'
keys Up
see '^> /quit'
keys C-c
see 'Ctrl-D or /quit leaves'
keys C-d
see '\(ended with 0\)'

step "the oldest turns are forgotten, and it is said"
start 100 --temp 0 -n 40 -c 160 --system "You are brief."
see '^>'
for number in 1 2 3 4 5; do
    ask "Question $number: what is $number plus $number?"
done
see 'forgotten: the context is full'
type_line "/system"
see '^You are brief\.$'
type_line "/quit"
see '\(ended with 0\)'

step "or refused"
start 100 --temp 0 -n 60 -c 160 --overflow refuse
see '^>'
ask "Question 1: what is the capital of France, and what is it known for?"
type_line "Question 2: what is the capital of Italy, and what is it known for? Name its rivers, too, and its hills."
see '^\[[0-9]+ token|/undo or /reset make room' 2
for _ in 1 2 3; do
    type_line "And of Spain, and of Portugal, and of Andorra, and of Morocco?"
done
see '/undo or /reset make room'
see_not 'forgotten'
type_line "/quit"
see '\(ended with 0\)'

step "Ctrl-C stops the reading of a long question"
for _ in $(seq 150); do echo 'a long line of words that say nothing at all'; done >"$work/long.txt"
start 100 --kernels scalar --threads 1 --temp 0 --file "$work/long.txt"
see 'reading'
keys C-c
see '\(stopped; the question is taken back\)'
see '^>'
type_line "/quit"
see '\(ended with 0\)'

# A grammar makes the model write just this.
sheet='# A *heading*\n\nSome \*\*bold text\*\*, \*italic text\* and `code` in a line that is long enough to be wrapped\.\n\n- first item\n- second item, which is longer than forty columns are\n\n\| name \| value \|\n\|------\|------:\|\n\| one \| 1 \|\n\| twenty \| 20 \|\n\n```rust\nlet answer = 42;\n```\nThe end\.'
escape=$'\e'
for columns in 40 100; do
    step "Markdown on $columns columns"
    start "$columns" --temp 0 --regex "${sheet/\*heading\*/\\*heading\\*}"
    see '^>'
    ask "Write."
    see '^A heading$'
    see '^• first item$'
    see '^name   │ value$'
    see '^───────┼──────$'
    see '^twenty │    20$'
    see '^let answer = 42;$'
    see_not '\*'
    screen -e >"$screens/markdown-$columns.ansi"
    grep -qE "${escape}\[[0-9;]*1mbold text" "$screens/markdown-$columns.ansi" || fail "no bold text"
    grep -qE "${escape}\[[0-9;]*36mcode" "$screens/markdown-$columns.ansi" || fail "code has no colour"
    [ "$columns" = 100 ] || see '^  forty columns are$|^  columns are$|^  are$'
    type_line "/set markdown off"
    ask "Write."
    see '^\| twenty \| 20 \|$'
    type_line "/quit"
    see '\(ended with 0\)'
done

step "without colours"
environment=NO_COLOR=1
start 100 --temp 0 --regex '\*\*bold\*\* and `code`'
see '^>'
ask "Write."
see '^bold and `code`$'
if screen -e | grep -q "${escape}\[[0-9;]*3[0-7]m"; then fail "there is colour"; fi
type_line "/quit"
see '\(ended with 0\)'

step "a screen that changes its size, and what is typed meanwhile"
start 100 --temp 0 -n 100 --logit-bias 2-inf
see '^>'
type_line "Tell me a long story about a ship."
grows
tmux resize-window -t chat -x 50 -y 20
type_line "/stats"
see '^turns +1 question$'
tmux resize-window -t chat -x 100 -y 30
type_line "/quit"
see '\(ended with 0\)'

step "ended by a signal in the middle of an answer, the terminal shows again what is typed"
start 100 --temp 0 -n 1000 --logit-bias 2-inf
see '^>'
type_line "Tell me a long story about a ship."
grows
kill -TERM "$(pgrep -P "$(tmux list-panes -t chat -F '#{pane_pid}')")"
see '\(ended with 143\)'
type_line "echoed"
see '^echoed$' 2

step "a dumb terminal"
environment=TERM=dumb
start 100 --temp 0 -n 24
see '^>'
type_line "Hello! How are you?"
type_line "/quit"
see '\(ended with 0\)'
screen | grep -qF -- "${greeting:0:20}" || fail "another answer than on a terminal"
screen -e >"$screens/dumb.ansi"
if grep -q "$escape" "$screens/dumb.ansi"; then fail "a dumb terminal is steered"; fi
environment=

step "a pipe"
set -f
options=(chat -m "$model" --temp 0 -n 24)
answer=$(echo "Hello! How are you?" | "$FEWBIT" "${options[@]}" 2>"$work/errors")
# Laid out in other rows, the words are the same.
[ "$(echo $answer)" = "$(echo $greeting)" ] || fail "another answer than on a terminal: $answer"
[ ! -s "$work/errors" ] || fail "$(cat "$work/errors")"
both=$(printf 'Hello! How are you?\n/stats\n/reset\nHello! How are you?\n' | "$FEWBIT" "${options[@]}" 2>/dev/null)
[ "$both" = "$answer"$'\n'"$answer" ] || fail "$both"

echo "The chat does what it should; screens are in $screens"
