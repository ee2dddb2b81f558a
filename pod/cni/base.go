package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
)

// Base tells which file the plugin's own would follow, and the types of the plugins
// in it. It changes nothing.
func (c Chain) Base() (file string, types []string, err error) {
	found, bad, err := c.read()
	if err == nil && len(found) == 0 {
		err = errors.Join(errNoBase, bad)
	}
	if err != nil {
		return "", nil, fmt.Errorf("chain of %s: %w", c.Dir, err)
	}
	file = found[0].name
	for _, raw := range found[0].list.plugins {
		var p struct {
			Type string `json:"type"`
		}
		if err := json.Unmarshal(raw, &p); err != nil {
			return file, nil, fmt.Errorf("chain of %s, file %s: %w", c.Dir, file, err)
		}
		types = append(types, p.Type)
	}
	if !slices.ContainsFunc(ownFiles[:written], func(name string) bool { return name < file }) {
		return file, types, fmt.Errorf("chain of %s, file %s: %w", c.Dir, file, errNoPlace)
	}
	return file, types, nil
}
