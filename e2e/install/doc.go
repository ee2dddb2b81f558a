// Package install tests that Tacit is installed on a cluster as a user does it, by the
// program tacit: what the cluster has afterwards, what it has when it lacks something,
// and that nothing is left at the end. All else of the mesh is other packages' work.
package install
