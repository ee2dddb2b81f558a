// Package node tests what Tacit does on a node beside carrying connections: the CNI
// plugin's place in the chain, pods that begin while the agent is away, reboots, pods
// that were there before, and pods of every kind.
//
// It has no code but tests.
package node
