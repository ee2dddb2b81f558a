package cni

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
)

// NamespacesName is the file, beside the network configurations, in which the agent
// keeps the namespaces whose pods may have to be protected. It has no name that a
// runtime reads, and outlives a reboot: the plugin reads it when the agent is away.
const NamespacesName = "tacit.namespaces"

// namespaces is the file.
type namespaces struct {
	Enrolled []string `json:"enrolled"`
}

// WriteNamespaces makes the file, whole or not at all, and reports whether it was
// another one before.
func WriteNamespaces(path string, enrolled []string) (changed bool, err error) {
	if enrolled == nil {
		enrolled = []string{}
	}
	text, err := json.MarshalIndent(namespaces{enrolled}, "", "  ")
	if err != nil {
		return false, err
	}
	changed, err = replace(path, append(text, '\n'))
	if err != nil {
		err = fmt.Errorf("keep the enrolled namespaces: %w", err)
	}
	return changed, err
}

// MayEnroll reports whether a pod of the namespace may have to be protected. Whatever is
// wrong with the file, it may.
func MayEnroll(path, namespace string) bool {
	if path == "" {
		return true
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return true
	}
	var n namespaces
	if json.Unmarshal(text, &n) != nil || n.Enrolled == nil {
		return true
	}
	return slices.Contains(n.Enrolled, namespace)
}
