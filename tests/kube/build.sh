#!/bin/sh
# build.sh FOLDER: kube-apiserver and etcd from their Go modules, unless they are there. Some minutes, and 3 GB of Go's
# cache, the first time.
set -eu
out=$1
here=$(cd "$(dirname "$0")" && pwd)
version=$(sed -n 's/^\tk8s.io\/kubernetes \(v[0-9.]*\)$/\1/p' "$here/go.mod")
[ -x "$out/$version/kube-apiserver" ] && [ -x "$out/$version/etcd" ] && exit 0
command -v go >/dev/null || { echo "there is no Go to build $version of kube-apiserver with" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp "$here/go.mod" "$here/tools.go" "$work"
cd "$work"
go mod tidy
# It refuses clients where it does not know its own version.
minor=${version#v1.}; minor=${minor%%.*}
named="-X k8s.io/component-base/version.gitVersion=$version -X k8s.io/component-base/version.gitMajor=1"
named="$named -X k8s.io/component-base/version.gitMinor=$minor"
export CGO_ENABLED=0
go build -trimpath -ldflags "-s -w $named" -o bin/ k8s.io/kubernetes/cmd/kube-apiserver
go build -trimpath -ldflags "-s -w" -o bin/etcd go.etcd.io/etcd/server/v3
mkdir -p "$out"
rm -rf "$out/$version"
mv bin "$out/$version"
