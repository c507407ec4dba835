#!/usr/bin/env bash
# Downloads COCO 2017 into a folder for `train.py --root DIR`:
#
#     ./get_coco.sh DIR
#
# creates DIR/annotations/instances_{train,val}2017.json and DIR/images/{train,val}2017. The same command resumes
# an interrupted download.
#
# COCO_URL        the server (http://images.cocodataset.org)
# COCO_CHECKSUMS  a file with other MD5 sums, in the format of the table below
set -euo pipefail

checksums="f4bbac642086de4f52a3fdda2de5fa2c annotations/annotations_trainval2017.zip
442b8da7639aecaf257c1dceb8ba8c80 zips/val2017.zip
cced6f7f71b7629ddf16f17bbcfab6b2 zips/train2017.zip"
if [[ -n ${COCO_CHECKSUMS:-} ]]; then checksums=$(<"$COCO_CHECKSUMS"); fi
url=${COCO_URL:-http://images.cocodataset.org}

fail() { echo "get_coco.sh: error: $*" >&2; exit 1; }
digest() { if command -v md5sum >/dev/null; then md5sum <"$1" | cut -d ' ' -f 1; else md5 -q "$1"; fi; }

download() { # PATH ZIP: a file named ZIP is complete and verified
    local sum attempt
    if [[ -f $2 ]]; then return; fi
    sum=$(awk -v path="$1" '$2 == path { print $1 }' <<<"$checksums")
    for attempt in 1 2 3 4 5; do # curl --retry would discard the partial file
        echo "get_coco.sh: downloading $url/$1 (attempt $attempt)" >&2
        if curl -fL --connect-timeout 20 --speed-limit 1000 --speed-time 60 -C - -o "$2.part" "$url/$1"; then break; fi
        if [[ $attempt == 5 ]]; then fail "cannot download $url/$1; run the command again to resume"; fi
        sleep 2
    done
    if [[ $(digest "$2.part") != "$sum" ]]; then
        rm "$2.part"
        fail "the checksum of $url/$1 is wrong; run the command again to download it again"
    fi
    mv "$2.part" "$2"
}

[[ $# == 1 && $1 != -* ]] || fail "usage: ./get_coco.sh DIR"
for tool in curl unzip; do command -v $tool >/dev/null || fail "$tool is not installed"; done
dir=$1
mkdir -p "$dir/annotations" "$dir/images"
unpacked=$dir/unpacked.tmp # a complete file or folder moves from here to its place

zip=$dir/annotations/annotations_trainval2017.zip
if [[ ! -f $dir/annotations/instances_val2017.json ]]; then
    download annotations/annotations_trainval2017.zip "$zip"
    rm -rf "$unpacked"
    unzip -q "$zip" "annotations/instances_*" -d "$unpacked"
    for split in train2017 val2017; do mv "$unpacked/annotations/instances_$split.json" "$dir/annotations/"; done
    rm -r "$unpacked" "$zip"
fi

for split in val2017 train2017; do
    zip=$dir/images/$split.zip
    if [[ -d $dir/images/$split ]]; then continue; fi
    download "zips/$split.zip" "$zip"
    rm -rf "$unpacked"
    unzip -q "$zip" -d "$unpacked"
    mv "$unpacked/$split" "$dir/images/"
    rm -r "$unpacked" "$zip"
done
echo "get_coco.sh: finished: train.py --root $dir" >&2
