package tacit

import (
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"
)

// pages are the Markdown files that a reader is led through: of the root, and docs/.
func pages(t *testing.T) []string {
	root, err := filepath.Glob("*.md")
	if err != nil {
		t.Fatal(err)
	}
	return append(root, markdown(t, "docs")...)
}

var (
	link    = regexp.MustCompile(`\]\(([^()\s]+(?:\([^()\s]*\)[^()\s]*)?)\)`)
	heading = regexp.MustCompile(`(?m)^#{1,6} +(.+)$`)
	fenced  = regexp.MustCompile("(?ms)^ *```.*?^ *```$")
)

// linksOf are the relative links of a page, as paths from the root, with their anchors.
func linksOf(t *testing.T, page string) (links [][2]string) {
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range link.FindAllStringSubmatch(fenced.ReplaceAllString(string(text), ""), -1) {
		if strings.Contains(m[1], "://") || strings.HasPrefix(m[1], "mailto:") {
			continue
		}
		file, anchor, _ := strings.Cut(m[1], "#")
		if file = path.Join(path.Dir(page), file); strings.HasPrefix(m[1], "#") {
			file = page
		}
		links = append(links, [2]string{file, anchor})
	}
	return links
}

// anchorsOf are the anchors that GitHub makes of a page's headings.
func anchorsOf(t *testing.T, page string) (anchors []string) {
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range heading.FindAllStringSubmatch(fenced.ReplaceAllString(string(text), ""), -1) {
		anchors = append(anchors, strings.Map(func(r rune) rune {
			switch {
			case r == ' ':
				return '-'
			case r == '-', r == '_', unicode.IsLetter(r), unicode.IsDigit(r):
				return unicode.ToLower(r)
			}
			return -1
		}, link.ReplaceAllString(m[1], "")))
	}
	return anchors
}

// TestLinksLeadSomewhere: a relative link names a file that is there, and a heading of it.
func TestLinksLeadSomewhere(t *testing.T) {
	checked := 0
	for _, page := range append(pages(t), "e2e/README.md") {
		for _, l := range linksOf(t, page) {
			checked++
			if _, err := os.Stat(l[0]); err != nil {
				t.Errorf("%s: link to %s: %v", page, l[0], err)
				continue
			}
			if l[1] != "" && !slices.Contains(anchorsOf(t, l[0]), l[1]) {
				t.Errorf("%s: %s has no heading #%s", page, l[0], l[1])
			}
		}
	}
	if checked < 50 {
		t.Errorf("%d links were checked, want at least 50", checked)
	}
}

// TestPagesAreReached: links lead from README.md to every page of docs/.
func TestPagesAreReached(t *testing.T) {
	seen := map[string]bool{"README.md": true}
	for next := []string{"README.md"}; len(next) > 0; next = next[1:] {
		for _, l := range linksOf(t, next[0]) {
			if strings.HasSuffix(l[0], ".md") && !seen[l[0]] {
				seen[l[0]] = true
				next = append(next, l[0])
			}
		}
	}
	for _, page := range markdown(t, "docs") {
		if !seen[page] {
			t.Errorf("no link leads to %s: name it in docs/README.md", page)
		}
	}
}

// width is how long a line of text is at most. Tables, code and addresses have lines of any length.
const width = 100

// wide are pages from before that rule. A page that is rewritten leaves the list.
var wide = []string{"CONTRIBUTING.md", "docs/architecture.md", "docs/limits.md", "docs/mesh.md", "docs/policy.md", "docs/ports.md", "docs/rights.md",
	"docs/scale.md", "docs/threat-model.md", "docs/wire.md", "docs/decisions/"}

func TestPagesWrap(t *testing.T) {
	for _, page := range pages(t) {
		if slices.ContainsFunc(wide, func(w string) bool { return strings.HasPrefix(page, w) }) {
			continue
		}
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		code := false
		for i, line := range strings.Split(string(text), "\n") {
			if strings.HasPrefix(strings.TrimSpace(line), "```") {
				code = !code
			}
			breaks := strings.Contains(strings.TrimSpace(line), " ") && !strings.HasPrefix(line, "|")
			if breaks && !code && len([]rune(line)) > width {
				t.Errorf("%s:%d has %d columns, want at most %d", page, i+1, len([]rune(line)), width)
			}
		}
	}
}
