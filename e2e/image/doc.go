// Package image makes container images without a container runtime: an OCI tar
// from files of this machine. The same files give the same image.
//
// It refuses to run anything while it builds, and to pull.
package image
