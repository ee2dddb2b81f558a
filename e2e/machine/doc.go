// Package machine is what runs inside a node's namespaces: its first process. The
// owner (package cluster) starts it in new mount, pid, uts, ipc and net namespaces,
// puts it into cgroups, lays its cables, and then hands it a Plan:
//
//	Wait     waits for the cgroups, enters a cgroup namespace, runs itself again
//	Init     reads the plan, makes a root of its own, starts Serve, reaps orphans
//	Serve    runs the plan's steps and keeps its processes running
//
// It makes no links, talks to no API server, and cleans nothing up: all it makes
// ends with its first process.
package machine
