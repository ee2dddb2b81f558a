// Package finding is what a node says of itself to whoever installs Tacit: whether
// it has what the agent needs, or whether anything of it is left. The words go from
// a short-lived container to the command line as the container's last message, which
// the kubelet passes on. They carry no knowledge of pods, and refuse to be long.
package finding

import (
	"encoding/json"
	"fmt"
	"os"
	"unicode/utf8"
)

const (
	// Path is where the kubelet looks for a container's last message.
	Path = "/dev/termination-log"
	// limit is what the kubelet passes on, in bytes; it cuts the rest off.
	limit = 4096
	// longest is what one text may have, so that a report of all findings fits.
	longest = 300
)

// Finding is one thing that was looked at.
type Finding struct {
	// What was looked at, such as "rules".
	What string `json:"what"`
	// Found is what there is, for people.
	Found string `json:"found,omitempty"`
	// Lacks says what is wrong; "" is nothing.
	Lacks string `json:"lacks,omitempty"`
	// Remedy says what to do about it.
	Remedy string `json:"remedy,omitempty"`
}

// Write writes a report to a file. Long texts are cut.
func Write(path string, all []Finding) error {
	short := make([]Finding, len(all))
	for i, f := range all {
		short[i] = Finding{What: cut(f.What), Found: cut(f.Found), Lacks: cut(f.Lacks), Remedy: cut(f.Remedy)}
	}
	text, err := json.Marshal(short)
	if err == nil && len(text) > limit {
		err = fmt.Errorf("%d bytes: the kubelet passes %d on", len(text), limit)
	}
	if err == nil {
		err = os.WriteFile(path, text, 0o600)
	}
	if err != nil {
		return fmt.Errorf("report: %w", err)
	}
	return nil
}

func cut(s string) string {
	if len(s) <= longest {
		return s
	}
	n := longest
	for !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n] + "…"
}

// Read reads a report.
func Read(text string) ([]Finding, error) {
	var all []Finding
	if err := json.Unmarshal([]byte(text), &all); err != nil {
		return nil, fmt.Errorf("read the report of a node %.200q: %w", text, err)
	}
	return all, nil
}
