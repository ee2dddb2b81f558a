package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/pflag"
	"sigs.k8s.io/yaml"

	"tacit.dev/control/kube"
)

// output is the format of what a verb prints: "" is text for people.
type output string

func (o *output) add(f *pflag.FlagSet) {
	f.VarP(o, "output", "o", "print `json` or yaml instead of text for people")
}

func (o *output) String() string { return string(*o) }
func (o *output) Type() string   { return "json|yaml" }

func (o *output) Set(s string) error {
	if !slices.Contains([]string{"json", "yaml"}, s) {
		return fmt.Errorf("%q: want json or yaml", s)
	}
	*o = output(s)
	return nil
}

// print writes v as o says.
func (o output) print(out io.Writer, v any) error {
	text, err := json.MarshalIndent(v, "", "  ")
	if err == nil && o == "yaml" {
		text, err = yaml.JSONToYAML(text)
	}
	if err != nil {
		return fmt.Errorf("print %s: %w", o, err)
	}
	_, err = fmt.Fprintf(out, "%s\n", strings.TrimSuffix(string(text), "\n"))
	return err
}

// Reports are what status and check print for programs. Their fields stay; more may come.
type (
	statusReport struct {
		Installed   bool             `json:"installed"`
		Version     string           `json:"version,omitempty"`
		InstalledBy string           `json:"installedBy,omitempty"`
		Health      *healthReport    `json:"health,omitempty"`
		Mesh        *kube.MeshStatus `json:"mesh,omitempty"`
	}
	healthReport struct {
		// Well: nothing is missing. Missing says what is.
		Well    bool         `json:"well"`
		Missing string       `json:"missing,omitempty"`
		Control partReport   `json:"control"`
		Nodes   []partReport `json:"nodes"`
		Pods    []podReport  `json:"pods"`
	}
	// partReport is control, or a node.
	partReport struct {
		Name    string `json:"name"`
		Ready   bool   `json:"ready"`
		Problem string `json:"problem,omitempty"`
	}
	podReport struct {
		Namespace string `json:"namespace"`
		Name      string `json:"name"`
		Protected bool   `json:"protected"`
		// Partly: some of what it would send is refused.
		Partly bool   `json:"partlyProtected,omitempty"`
		Reason string `json:"reason,omitempty"`
	}
	// requirementsReport is what check found before there is an installation.
	requirementsReport struct {
		Installed    bool                `json:"installed"`
		Met          bool                `json:"met"`
		Requirements []requirementReport `json:"requirements"`
	}
	requirementReport struct {
		Node   string `json:"node,omitempty"`
		What   string `json:"what"`
		Met    bool   `json:"met"`
		Found  string `json:"found,omitempty"`
		Lacks  string `json:"lacks,omitempty"`
		Remedy string `json:"remedy,omitempty"`
	}
)

func (h *health) report() *healthReport {
	missing := h.missing()
	r := &healthReport{Well: missing == "", Missing: missing, Nodes: []partReport{}, Pods: []podReport{}}
	r.Control = partReport{controlName, h.control == "", h.control}
	for _, node := range sortedNodes(h.nodes) {
		r.Nodes = append(r.Nodes, partReport{node, h.nodes[node] == "", h.nodes[node]})
	}
	for _, node := range sortedNodes(h.away) {
		r.Nodes = append(r.Nodes, partReport{node, false, h.away[node]})
	}
	for _, name := range sortedNodes(h.pods) {
		p := h.pods[name]
		namespace, name, _ := strings.Cut(name, "/")
		r.Pods = append(r.Pods, podReport{namespace, name, p.protected, p.partly, p.why})
	}
	return r
}

func (r *report) requirements() requirementsReport {
	list := requirementsReport{Met: r.lacking() == 0, Requirements: []requirementReport{}}
	for _, f := range r.all {
		list.Requirements = append(list.Requirements, requirementReport{f.node, f.What, f.Lacks == "", f.Found, f.Lacks, f.Remedy})
	}
	return list
}
