// Package control holds the tests of what tacit-control does on a real Kubernetes: who
// is enrolled, what people are shown, and what a node may have.
package control
