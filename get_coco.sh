#!/usr/bin/env bash
# Fetches COCO 2017 into a folder that train.py reads with --root:
#
#     ./get_coco.sh [--keep_zips] DIR
#
# leaves DIR/annotations/instances_{train,val}2017.json and DIR/images/{train,val}2017. With --keep_zips the pictures
# stay in DIR/images/{train,val}2017.zip, from which the trainer reads them as well; otherwise an archive is removed
# once it is unpacked. Interrupted anywhere and started again, it goes on; what is finished is not done again.
#
# COCO_URL        another server in place of http://images.cocodataset.org
# COCO_CHECKSUMS  a file in place of the table below
# COCO_RETRIES    how many attempts in a row may bring nothing before a download is given up (5)
set -euo pipefail

table="f4bbac642086de4f52a3fdda2de5fa2c 252907541 annotations/annotations_trainval2017.zip
442b8da7639aecaf257c1dceb8ba8c80 815585330 zips/val2017.zip
cced6f7f71b7629ddf16f17bbcfab6b2 19336861798 zips/train2017.zip"
dir="" keep_zips="" need=0 unfinished=""

say() { echo "get_coco.sh: $*" >&2; }
fail() { say "error: $*"; exit 1; }
size() { if [[ -f $1 ]]; then wc -c <"$1" | tr -d ' '; else echo 0; fi; }
unpacked() { for item in $items; do [[ -f $place/$item || -n $(ls -A "$place/$item" 2>/dev/null) ]] || return 1; done; }
kept() { [[ -n $keep_zips && $path == zips/* ]]; }

each() { # COMMAND, with what it needs to know of each archive in variables
    while read -r sum bytes path <&3; do
        name=${path##*/}
        place=$dir/images items=${name%.zip} members="${name%.zip}/*" prefix=""
        if [[ $path == annotations/* ]]; then
            place=$dir/annotations items="instances_train2017.json instances_val2017.json"
            members="annotations/instances_*" prefix=annotations/
        fi
        zip=$place/$name
        "$1" || unfinished="$unfinished $name"
    done 3<<<"$table"
}

count() { # the free space it needs
    if unpacked; then return; fi
    if [[ ! -f $zip ]]; then need=$((need + bytes - $(size "$zip.part"))); fi
    if ! kept; then need=$((need + bytes)); fi
}

download() { # to FILE; not with curl's own --retry, which throws away what an attempt has brought
    local attempts=0 most code url=${COCO_URL:-http://images.cocodataset.org}/$path
    most=$(size "$1")
    while (($(size "$1") < bytes)); do
        code=0
        curl -fL "$progress" --connect-timeout 20 --speed-limit 1000 --speed-time 60 -C - -o "$1" "$url" || code=$?
        if ((code == 0)); then break; fi
        if (($(size "$1") > most)); then attempts=0 most=$(size "$1"); else attempts=$((attempts + 1)); fi
        if ((code == 33)); then rm -f "$1"; fi # the server sends files from their beginning only
        if ((code == 23 || attempts > ${COCO_RETRIES:-5})); then # 23: the disk does not take it
            say "error: $url: cannot be downloaded (curl's error $code); start again to go on from byte $(size "$1")"
            return 1
        fi
        if ((attempts > 0)); then sleep 2; fi
    done
}

get() { # only an archive whose checksum is right has its name, and only a folder that is whole
    local file=$zip
    if unpacked; then say "$name: is there, unpacked" && clean; return; fi
    if [[ ! -f $zip ]]; then say "$name: downloading" && file=$zip.part && download "$file" || return 1; fi
    say "$name: checking"
    if [[ $(digest "$file") != "$sum" ]]; then
        mv -f "$file" "$zip.bad"
        say "error: $name: wrong checksum, so it is now $zip.bad; start again to fetch it anew" && return 1
    fi
    if [[ $file != "$zip" ]]; then mv "$file" "$zip" || return 1; fi
    if kept; then return; fi
    say "$name: unpacking"
    rm -rf "$zip.unpacking"
    unzip -q "$zip" "$members" -d "$zip.unpacking" || { say "error: $zip: cannot be unpacked" && return 1; }
    for item in $items; do mv "$zip.unpacking/$prefix$item" "$place/" || return 1; done
    clean
}

clean() { # the folder goes last: while it is there, this is not done
    if [[ -d $zip.unpacking && -z $keep_zips ]]; then rm -f "$zip"; fi
    rm -rf "$zip.unpacking"
}

for word in "$@"; do
    if [[ $word == --keep_zips ]]; then keep_zips=1; continue; fi
    [[ $word != -* && -z $dir ]] || fail "$word: it is ./get_coco.sh [--keep_zips] DIR"
    dir=$word
done
[[ -n $dir ]] || fail "name a folder: ./get_coco.sh [--keep_zips] DIR"
for tool in curl unzip awk; do command -v $tool >/dev/null || fail "$tool is not installed"; done
if command -v md5sum >/dev/null; then digest() { md5sum <"$1" | cut -d ' ' -f 1; }
elif command -v md5 >/dev/null; then digest() { md5 -q "$1"; } # macOS
else fail "md5sum is not installed"; fi
if [[ -t 2 ]]; then progress="-#"; else progress=-sS; fi
if [[ -n ${COCO_CHECKSUMS:-} ]]; then table=$(<"$COCO_CHECKSUMS"); fi
mkdir -p "$dir/annotations" "$dir/images"
each count
free=$(df -Pk "$dir" | awk 'NR == 2 { print int($4 / 1000 * 1.024) }') need=$((need / 1000000))
((free >= need)) || fail "$dir: $need MB of free space are needed, $free MB are left; --keep_zips takes half"
each get
[[ -z $unfinished ]] || fail "not finished:$unfinished"
say "finished: train.py --root $dir"
