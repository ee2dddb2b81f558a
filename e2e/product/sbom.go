package product

import (
	"debug/buildinfo"
	"encoding/json"
	"fmt"
	"net/url"
	"slices"
	"strings"

	"tacit.dev/e2e/image"
)

// bill is a CycloneDX document, as far as we have something to say. It has no
// time and no serial number: the same image has the same bill.
type bill struct {
	Format     string      `json:"bomFormat"`
	Spec       string      `json:"specVersion"`
	Version    int         `json:"version"`
	Metadata   metadata    `json:"metadata"`
	Components []component `json:"components"`
}

type metadata struct {
	Component component `json:"component"`
}

type component struct {
	Type    string `json:"type"`
	Ref     string `json:"bom-ref"`
	Name    string `json:"name"`
	Version string `json:"version"`
	PURL    string `json:"purl,omitempty"`
}

// billOf lists the modules that our programs were linked from, as they say
// themselves, and the Debian packages of the rest.
func billOf(name, version string, files []image.File, packages []image.Package) (string, error) {
	b := bill{Format: "CycloneDX", Spec: "1.6", Version: 1,
		Metadata: metadata{component{Type: "container", Ref: name, Name: name, Version: version}}}
	for _, f := range files {
		if !strings.HasPrefix(f.Path, "/tacit-") {
			continue
		}
		found, err := modulesOf(f.Source)
		if err != nil {
			return "", err
		}
		b.Components = append(b.Components, found...)
	}
	for _, p := range packages {
		purl := fmt.Sprintf("pkg:deb/debian/%s@%s?arch=%s", p.Name, url.QueryEscape(p.Version), p.Architecture)
		b.Components = append(b.Components, library(p.Name, p.Version, purl))
	}
	slices.SortFunc(b.Components, func(a, b component) int { return strings.Compare(a.Ref, b.Ref) })
	b.Components = slices.Compact(b.Components)
	text, err := json.MarshalIndent(b, "", "  ")
	return string(text) + "\n", err
}

// modulesOf are the modules that a Go program was linked from, and Go itself.
func modulesOf(program string) ([]component, error) {
	info, err := buildinfo.ReadFile(program)
	if err != nil {
		return nil, fmt.Errorf("modules of %s: %w", program, err)
	}
	version := strings.TrimPrefix(info.GoVersion, "go")
	found := []component{library("stdlib", version, "pkg:golang/stdlib@"+version)}
	for _, d := range info.Deps {
		if d.Replace != nil {
			d = d.Replace
		}
		found = append(found, library(d.Path, d.Version, "pkg:golang/"+d.Path+"@"+d.Version))
	}
	return found, nil
}

func library(name, version, purl string) component {
	return component{Type: "library", Ref: purl, Name: name, Version: version, PURL: purl}
}
