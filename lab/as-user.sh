#!/bin/sh
# Runs stories as an ordinary user, in a user namespace of its own; root becomes
# nobody for that. Those that need several users of the machine are left out by
# their own [root] conditions.
set -eu
cd "$(dirname "$0")/.."
stories=${1:-basic|plain|receiver|services|plugin|privilege|enroll|killed}

if [ "$(id -u)" != 0 ]; then
  TACIT_BIN=$PWD/bin exec .ci/noskip go test -v -count=1 -parallel 1 -timeout 10m ./lab -run "TestStories/^($stories)\$"
fi
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
mkdir "$dir/home" "$dir/bin"
cp bin/* "$dir/bin"
cp -r lab/testdata "$dir/testdata"
go test -c -o "$dir/lab.test" ./lab
chown -R nobody: "$dir"
# The user need not be able to read this folder: everything it runs is in its own.
noskip=$PWD/.ci/noskip
cd "$dir"
"$noskip" setpriv --reuid=nobody --regid=nogroup --clear-groups env -i PATH="$PATH" HOME="$dir/home" TMPDIR="$dir/home" \
  TACIT_BIN="$dir/bin" CI="${CI:-}" "$dir/lab.test" -test.v -test.parallel 1 -test.run "TestStories/^($stories)\$"
