//go:build tools

// Package tools names the programs, so that `go mod tidy` finds what they need.
package tools

import (
	_ "go.etcd.io/etcd/server/v3"
	_ "k8s.io/kubernetes/cmd/kube-apiserver"
)
