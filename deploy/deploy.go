// Package deploy has inside what installs Tacit on a cluster: the Helm chart. The
// program tacit carries it, so that a version of the program installs that version
// of the mesh. It stands before both ways, and refuses to do anything: cli does.
package deploy

import "embed"

// Chart is the folder helm/tacit.
//
//go:embed all:helm/tacit
var Chart embed.FS
