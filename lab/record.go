package lab

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"

	"tacit.dev/pod/netns"
)

// Record captures what passes all links of a network namespace, lo apart, into a
// file, for tests outside of the lab. It says "recording" when it has begun, and
// then answers each line of questions, which are those of the verb capture with
// addresses instead of names:
//
//	grep TEXT
//	tls A B
//	ports A B PORT...
//	count A B
//
// with a line "yes: …" or "no: …", about everything that has passed before it was
// asked. It returns when questions end, or when it cannot know: packets were
// missed, or a question is none.
func Record(namespace, file string, questions io.Reader, answers io.Writer) error {
	ns, err := netns.Open(namespace)
	if err != nil {
		return err
	}
	defer ns.Close()
	c, err := startCapture(file, ns, "")
	if err != nil {
		return err
	}
	fmt.Fprintln(answers, "recording")
	lines := bufio.NewScanner(questions)
	for lines.Scan() {
		answer, err := c.answer(lines.Text())
		if err != nil {
			return errors.Join(err, c.close())
		}
		fmt.Fprintln(answers, answer)
	}
	return errors.Join(lines.Err(), c.close())
}

func (c *capture) answer(question string) (string, error) {
	what, rest, _ := strings.Cut(question, " ")
	words := strings.Fields(rest)
	if what == "grep" {
		words = []string{rest} // with its spaces
	}
	check, err := newCaptureCheck(what, words, func(address string) ([]netip.Addr, error) {
		a, err := netip.ParseAddr(address)
		return []netip.Addr{a}, err
	})
	if err != nil {
		return "", err
	}
	if err := c.read(check.see); err != nil {
		return "", err
	}
	said, err := check.verdict()
	if err != nil {
		return "no: " + err.Error(), nil
	}
	return "yes: " + said, nil
}
